"""The linear scan and its adjoint, as loops in float64 over one token at a time."""

import numpy as np

NAMES = ("log_decay", "values", "initial")


def scan(inputs, documents):
    """The states (B, L, E) after each token."""
    log_decay, values, initial = (inputs[name] for name in NAMES)
    states = np.zeros(values.shape)
    for row, t in np.ndindex(*values.shape[:2]):
        before = _state_before(states, initial, documents, row, t)
        states[row, t] = np.exp(log_decay[row, t]) * before + values[row, t]
    return states


def gradients(inputs, documents, d_outputs, d_final):
    """Gradients by name of <d_outputs, states> + <d_final, final state>."""
    log_decay, values, initial = (inputs[name] for name in NAMES)
    states = scan(inputs, documents)
    result = {name: np.zeros(inputs[name].shape) for name in NAMES}
    for row in range(values.shape[0]):
        adjoint = d_final[row].copy()
        for t in reversed(range(values.shape[1])):
            adjoint = adjoint + d_outputs[row, t]
            result["values"][row, t] = adjoint
            before = _state_before(states, initial, documents, row, t)
            decayed = adjoint * np.exp(log_decay[row, t])
            result["log_decay"][row, t] = decayed * before
            adjoint = np.zeros_like(adjoint) if _starts(documents, row, t) else decayed
        result["initial"][row] = adjoint
    return result


def _starts(documents, row, t):
    previous = 0 if t == 0 else documents[row, t - 1]
    return documents[row, t] != previous


def _state_before(states, initial, documents, row, t):
    if _starts(documents, row, t):
        return np.zeros_like(initial[row])
    return initial[row] if t == 0 else states[row, t - 1]
