"""The selective scan and its adjoint, as loops in float64 over one token at a time."""

import numpy as np

NAMES = ("values", "dt", "A", "B", "C", "initial")


def scan(inputs, documents):
    """Outputs (B, L, E) and the states (B, L, E, N) after each token."""
    values, dt, A, B, C, initial = (inputs[name] for name in NAMES)
    batch, length, channels = values.shape
    outputs = np.zeros((batch, length, channels))
    states = np.zeros((batch, length, channels, A.shape[1]))
    for row in range(batch):
        for t in range(length):
            state = _state_before(states, initial, documents, row, t)
            decay = np.exp(dt[row, t][:, None] * A)
            added = (dt[row, t] * values[row, t])[:, None] * B[row, t][None, :]
            states[row, t] = decay * state + added
            outputs[row, t] = states[row, t] @ C[row, t]
    return outputs, states


def gradients(inputs, documents, d_outputs, d_final):
    """Gradients by name of <d_outputs, outputs> + <d_final, final state>."""
    values, dt, A, B, C, initial = (inputs[name] for name in NAMES)
    _, states = scan(inputs, documents)
    result = {name: np.zeros_like(inputs[name]) for name in NAMES}
    batch, length, _ = values.shape
    for row in range(batch):
        adjoint = d_final[row].copy()
        for t in reversed(range(length)):
            adjoint = adjoint + d_outputs[row, t][:, None] * C[row, t][None, :]
            before = _state_before(states, initial, documents, row, t)
            decay = np.exp(dt[row, t][:, None] * A)
            by_exponent = adjoint * decay * before
            by_input = adjoint @ B[row, t]
            result["values"][row, t] = dt[row, t] * by_input
            result["dt"][row, t] = values[row, t] * by_input + (by_exponent * A).sum(1)
            result["A"] += by_exponent * dt[row, t][:, None]
            result["B"][row, t] = (dt[row, t] * values[row, t]) @ adjoint
            result["C"][row, t] = d_outputs[row, t] @ states[row, t]
            starts = _starts(documents, row, t)
            adjoint = np.zeros_like(adjoint) if starts else adjoint * decay
        result["initial"][row] = adjoint
    return result


def _starts(documents, row, t):
    previous = 0 if t == 0 else documents[row, t - 1]
    return documents[row, t] != previous


def _state_before(states, initial, documents, row, t):
    if _starts(documents, row, t):
        return np.zeros_like(initial[row])
    return initial[row] if t == 0 else states[row, t - 1]
