"""The scan with one decay per head, its adjoint, its matrices and the mixers made of it.

Float64 loops over tokens, heads and pairs, from the definitions and named weights alone.
"""

import numpy as np

from tests.oracles.mixers import convolve, silu

NAMES = ("values", "dt", "A", "B", "C", "initial")
Array = np.ndarray


def scan(inputs, documents):
    """Outputs (B, L, H, P) and the states (B, L, H, P, N) after each token."""
    values, dt, A, B, C, initial = (inputs[name] for name in NAMES)
    batch, length, heads, width = values.shape
    each = heads // B.shape[2]
    outputs = np.zeros(values.shape)
    states = np.zeros((batch, length, heads, width, B.shape[3]))
    for row in range(batch):
        for t in range(length):
            before = _state_before(states, initial, documents, row, t)
            for h in range(heads):
                added = dt[row, t, h] * np.outer(values[row, t, h], B[row, t, h // each])
                states[row, t, h] = np.exp(dt[row, t, h] * A[h]) * before[h] + added
                outputs[row, t, h] = states[row, t, h] @ C[row, t, h // each]
    return outputs, states


def gradients(inputs, documents, d_outputs, d_final):
    """Gradients by name of <d_outputs, outputs> + <d_final, final state>."""
    values, dt, A, B, C, initial = (inputs[name] for name in NAMES)
    _, states = scan(inputs, documents)
    result = {name: np.zeros_like(inputs[name]) for name in NAMES}
    batch, length, heads, _ = values.shape
    each = heads // B.shape[2]
    for row in range(batch):
        adjoint = d_final[row].copy()
        for t in reversed(range(length)):
            before = _state_before(states, initial, documents, row, t)
            for h in range(heads):
                b, c, decay = (
                    B[row, t, h // each],
                    C[row, t, h // each],
                    np.exp(dt[row, t, h] * A[h]),
                )
                adjoint[h] += np.outer(d_outputs[row, t, h], c)
                by_exponent = decay * (adjoint[h] * before[h]).sum()
                by_step = adjoint[h] @ b
                result["values"][row, t, h] = dt[row, t, h] * by_step
                result["dt"][row, t, h] = values[row, t, h] @ by_step + A[h] * by_exponent
                result["A"][h] += dt[row, t, h] * by_exponent
                result["B"][row, t, h // each] += dt[row, t, h] * values[row, t, h] @ adjoint[h]
                result["C"][row, t, h // each] += d_outputs[row, t, h] @ states[row, t, h]
                adjoint[h] *= 0.0 if _starts(documents, row, t) else decay
        result["initial"][row] = adjoint
    return result


def matrix(dt: Array, A: Array, B: Array, C: Array, documents: Array) -> Array:
    """The matrix of each head (H, L, L) of one row, entry by entry; B and C are (L, G, N)."""
    length, heads = dt.shape
    each = heads // B.shape[1]
    out = np.zeros((heads, length, length))
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                if documents[i] == documents[j]:
                    decay = np.exp(A[h] * dt[j + 1 : i + 1, h].sum())
                    out[h, i, j] = C[i, h // each] @ B[j, h // each] * decay * dt[j, h]
    return out


def mamba2(weights, x, documents, groups, limit=(0.0, np.inf)):
    """Dao and Gu 2024, section 7, one row (L, D)."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, width = len(w["A_log"]), len(w["norm.weight"])
    stacked = x.astype(np.float64) @ w["in_proj.weight"].T
    z, inner, raw = np.split(stacked, [width, stacked.shape[1] - heads], axis=1)
    inner = silu(convolve(inner, w["conv.weight"], w["conv.bias"], documents))
    u, B, C = np.split(inner, [width, (width + inner.shape[1]) // 2], axis=1)
    steps = np.clip(np.log1p(np.exp(raw + w["dt_bias"])), *limit)
    by_group = (part.reshape(len(x), groups, -1) for part in (B, C))
    entries = matrix(steps, -np.exp(w["A_log"]), *by_group, documents)
    out = np.zeros((len(x), width))
    for t in range(len(x)):
        heads_of_u = u.reshape(len(x), heads, -1)
        y = np.stack([entries[h, t] @ heads_of_u[:, h] for h in range(heads)])
        y = (y + w["D"][:, None] * heads_of_u[t]).ravel() * silu(z[t])
        parts = y.reshape(groups, -1)
        out[t] = (parts / np.sqrt((parts**2).mean(axis=1, keepdims=True) + 1e-5)).ravel()
    return (out * w["norm.weight"]) @ w["out_proj.weight"].T


def hydra(weights, x, documents, groups):
    """Hwang et al. 2024, section 3.2 and figure 3, one row (L, D)."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, width = len(w["A_log"]), len(w["norm.weight"])
    stacked = x.astype(np.float64) @ w["in_proj.weight"].T
    z, inner, raw = np.split(stacked, [width, stacked.shape[1] - 2 * heads], axis=1)
    inner = silu(convolve_centred(inner, w["conv.weight"], w["conv.bias"], documents))
    u, shared = inner[:, :width], inner[:, width:].reshape(len(x), 2, 2, groups, -1)
    steps = np.log1p(np.exp(raw.reshape(len(x), 2, heads) + w["dt_bias"]))
    diagonal = u @ w["fc_D.weight"].T + w["D"]
    A = -np.exp(w["A_log"])
    entries = quasiseparable(steps, A, shared[:, :, 0], shared[:, :, 1], diagonal, documents)
    y = np.einsum("hts,shp->thp", entries, u.reshape(len(x), heads, -1)).reshape(len(x), width)
    y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + 1e-5) * w["norm.weight"]
    return (y * silu(z)) @ w["out_proj.weight"].T


def quasiseparable(dt, A, B, C, diagonal, documents):
    """Hydra's matrices (H, L, L), entry by entry; dt (L, 2, H), B and C (L, 2, G, N)."""
    length, _, heads = dt.shape
    each = heads // B.shape[2]
    out = np.zeros((heads, length, length))
    for h in range(heads):
        for i in range(length):
            for j in range(length):
                if documents[i] != documents[j]:
                    continue
                way, read = (0, i - 1) if i > j else (1, i + 1)
                between = dt[j + 1 : i, 0, h] if i > j else dt[i + 1 : j, 1, h]
                if i == j:
                    out[h, i, j] = diagonal[i, h]
                    continue
                product = C[read, way, h // each] @ B[j, way, h // each]
                out[h, i, j] = product * np.exp(A[h] * between.sum()) * dt[j, way, h]
    return out


def convolve_centred(x: Array, taps: Array, bias: Array, documents: Array) -> Array:
    """Depthwise convolution over both sides that never leaves a document."""
    length, width = x.shape[0], taps.shape[1]
    out = np.tile(bias, (length, 1))
    for t in range(length):
        for k in range(width):
            s = t + k - width // 2
            if 0 <= s < length and documents[s] == documents[t]:
                out[t] += taps[:, k] * x[s]
    return out


def counted_scan_flops(length, chunk, heads, width, groups, states):
    """Products needed and elementwise work of the scan by chunks, counted as it is done."""
    products, elementwise = 0, 0
    for begin in range(0, length, chunk):
        tokens = range(begin, min(begin + chunk, length))
        for i in tokens:
            for _ in range(begin, i + 1):
                products += groups * 2 * states  # C[i] . B[j]
                elementwise += heads * 3  # difference of log decays, its exponential, times C B
                products += heads * 2 * width  # times (dt x)[j], added to y[i]
            elementwise += heads * 2  # dt A, added to the running sum
            elementwise += heads * 1  # decay from the chunk's start: an exponential
            elementwise += heads * 3  # decay to its end: a difference, an exponential, times dt
            elementwise += heads * width * 2  # dt x, and dt x decayed to the end
            products += heads * 2 * width * states  # into the chunk's state
            products += heads * 2 * width * states  # the state before the chunk times C[i]
            elementwise += heads * width * 2  # decayed to i, added to y[i]
        elementwise += heads * width * states * 2  # the state decays and takes up the chunk's
    return products, elementwise


def _starts(documents, row, t):
    previous = 0 if t == 0 else documents[row, t - 1]
    return documents[row, t] != previous


def _state_before(states, initial, documents, row, t):
    if _starts(documents, row, t):
        return np.zeros_like(initial[row])
    return initial[row] if t == 0 else states[row, t - 1]
