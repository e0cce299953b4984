"""Whole mixers as float64 loops over tokens, from named weights alone: what a paper states."""

import numpy as np

Array = np.ndarray


def mamba(weights: dict[str, Array], x: Array, documents: Array) -> Array:
    """Gu and Dao 2023, algorithm 2, one row (L, D); a new document starts from nothing."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    L = x.shape[0]
    E, N = w["A_log"].shape
    rank = w["dt_proj.weight"].shape[1]
    stacked = x.astype(np.float64) @ w["in_proj.weight"].T
    inner, gate = stacked[:, :E], stacked[:, E:]
    convolved = convolve(inner, w["conv.weight"], w["conv.bias"], documents)
    u = silu(convolved)
    out = np.zeros((L, x.shape[1]))
    state = np.zeros((E, N))
    for t in range(L):
        if t and documents[t] != documents[t - 1]:
            state = np.zeros((E, N))
        features = w["x_proj.weight"] @ u[t]
        dt = np.log1p(np.exp(w["dt_proj.weight"] @ features[:rank] + w["dt_bias"]))
        B, C = features[rank : rank + N], features[rank + N :]
        for e in range(E):
            for n in range(N):
                decay = np.exp(-dt[e] * np.exp(w["A_log"][e, n]))
                state[e, n] = decay * state[e, n] + dt[e] * B[n] * u[t, e]
        y = state @ C + w["D"] * u[t]
        out[t] = w["out_proj.weight"] @ (y * silu(gate[t]))
    return out


def attention(
    weights: dict[str, Array], x: Array, documents: Array, heads: int, theta: float
) -> Array:
    """Rotary attention with normalised queries and keys, one row (L, D), key by key."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    L, D = x.shape
    P = D // heads
    stacked = x.astype(np.float64) @ w["qkv.weight"].T
    q, k, v = (stacked[:, i * D : (i + 1) * D].reshape(L, heads, P) for i in range(3))
    out = np.zeros((L, heads, P))
    first = 0
    for t in range(L):
        if t and documents[t] != documents[t - 1]:
            first = t
        for h in range(heads):
            query = turned(normed(q[t, h], w["q_norm.weight"]), t - first, theta)
            keys = [
                turned(normed(k[s, h], w["k_norm.weight"]), s - first, theta)
                for s in range(first, t + 1)
            ]
            scores = np.array([query @ key for key in keys]) / np.sqrt(P)
            share = np.exp(scores - scores.max())
            out[t, h] = (share / share.sum()) @ v[first : t + 1, h]
    return out.reshape(L, D) @ w["out.weight"].T


def convolve(x: Array, taps: Array, bias: Array, documents: Array) -> Array:
    """Causal depthwise convolution that never leaves a document."""
    L, W = x.shape[0], taps.shape[1]
    out = np.tile(bias, (L, 1))
    for t in range(L):
        for j in range(W):
            s = t - (W - 1 - j)
            if s >= 0 and documents[s] == documents[t]:
                out[t] += taps[:, j] * x[s]
    return out


def normed(x: Array, weight: Array) -> Array:
    """Root-mean-square norm with epsilon 1e-5."""
    return x / np.sqrt(np.mean(x * x) + 1e-5) * weight


def turned(x: Array, position: int, theta: float) -> Array:
    """Rotate channel p with channel p + P/2 by position * theta ** (-2 p / P)."""
    P = len(x)
    out = np.zeros(P)
    for p in range(P // 2):
        angle = position * theta ** (-2.0 * p / P)
        a, b = x[p], x[p + P // 2]
        out[p] = a * np.cos(angle) - b * np.sin(angle)
        out[p + P // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def semiseparable(dt: Array, A: Array, B: Array, C: Array, D: Array, documents: Array) -> Array:
    """Mamba's mixing matrix of each channel, (E, L, L), entry by entry (Hydra paper, section 2)."""
    L, E = dt.shape
    matrix = np.zeros((E, L, L))
    for t in range(L):
        for s in range(t + 1):
            if documents[t] != documents[s]:
                continue
            between = dt[s + 1 : t + 1].sum(axis=0)
            decay = np.exp(between[:, None] * A)
            matrix[:, t, s] = dt[s] * (decay * B[s] * C[t]).sum(axis=1)
        matrix[:, t, t] += D
    return matrix


def counted_scan_flops(length: int, channels: int, states: int) -> int:
    """Pointwise operations of Mamba's scan, counted one at a time in the loop that does them."""
    count = 0
    for _ in range(length):
        for _ in range(channels):
            count += 2  # dt * x, and D * x
            for _ in range(states):
                count += 2  # dt * A, its exponential
                count += 3  # decay * h, (dt x) * B, their sum
                count += 2  # C * h, added to y
    return count
