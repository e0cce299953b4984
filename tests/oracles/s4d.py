"""S4D as a float64 recurrence over complex states, token by token."""

import math

import numpy as np

Array = np.ndarray


def mixer(weights: dict[str, Array], x: Array, documents: Array) -> Array:
    """The layer of Gu et al. 2022 with its GLU, one row (L, D), in one direction or two."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = x.astype(np.float64)
    y = recurrence(w, x, documents, 0) + w["D"] * x
    if w["C"].shape[0] == 2:
        # Later tokens: the same backwards, from the token after on.
        back = recurrence(w, x[::-1], documents[::-1], 1)[::-1]
        for t in range(len(x) - 1):
            if documents[t + 1] == documents[t]:
                y[t] += back[t + 1]
    bent = np.vectorize(gelu)(y) @ w["out_proj.weight"].T + w["out_proj.bias"]
    left, right = np.split(bent, 2, axis=1)
    return left / (1 + np.exp(-right))


def recurrence(w: dict[str, Array], x: Array, documents: Array, direction: int) -> Array:
    """h[t] = exp(dt A) h[t-1] + (exp(dt A) - 1) / A x[t], y[t] = 2 Re <C, h[t]>."""
    A = -np.exp(w["A_log"]) + 1j * w["A_imag"]
    decay = np.exp(np.exp(w["log_dt"])[:, None] * A)
    C = w["C"][direction, ..., 0] + 1j * w["C"][direction, ..., 1]
    state = np.zeros(A.shape, dtype=complex)
    y = np.zeros(x.shape)
    for t in range(len(x)):
        if t and documents[t] != documents[t - 1]:
            state = np.zeros(A.shape, dtype=complex)
        state = decay * state + (decay - 1) / A * x[t][:, None]
        y[t] = 2 * (C * state).sum(axis=1).real
    return y


def gelu(x: float) -> float:
    """x times the normal distribution function of x."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
