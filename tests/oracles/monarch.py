"""Monarch Mixer and Monarch matrices from their definitions, in float64, one entry at a time."""

import numpy as np

from tests.oracles.mixers import convolve

Array = np.ndarray


def mixer(weights: dict[str, Array], x: Array, documents: Array, max_len: int) -> Array:
    """M2's sequence mixer, one row (L, D), as the release computes it but document by document."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = x.astype(np.float64)
    D = x.shape[1]
    stacked = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    stacked = convolve(stacked, w["conv.weight"], w["conv.bias"], documents)
    x1, x2, v = stacked[:, :D], stacked[:, D : 2 * D], stacked[:, 2 * D :]
    y = x1 * long_convolution(w, "filter.", x2 * v, documents, max_len)
    if any(name.startswith("residual_filter.") for name in w):
        y = y + long_convolution(w, "residual_filter.", x, documents, max_len)
    return y @ w["out_proj.weight"].T + w["out_proj.bias"]


def long_convolution(
    w: dict[str, Array], prefix: str, z: Array, documents: Array, max_len: int
) -> Array:
    """A sum over each document, over later tokens too where there is a filter of them."""
    own = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
    directions = own["in_bias"].shape[0]
    taps = [filter_taps(own, max_len, r) for r in range(directions)]
    y = own["skip"] * z
    for t in range(len(z)):
        for s in range(len(z)):
            if documents[s] != documents[t]:
                continue
            if s <= t:
                y[t] += taps[0][t - s] * z[s]
            elif directions == 2:
                y[t] += taps[1][s - t - 1] * z[s]
    return y


def filter_taps(w: dict[str, Array], max_len: int, direction: int) -> Array:
    """Network times window at each lag, (max_len, D)."""
    D = w["skip"].shape[0]
    taps = np.zeros((max_len, D))
    for lag in range(max_len):
        h = w["features"][lag]
        h = np.sin(w["frequency"] * (h @ w["in_weight"][direction] + w["in_bias"][direction]))
        for layer in range(w["inner_weight"].shape[1]):
            inner, bias = w["inner_weight"][direction, layer], w["inner_bias"][direction, layer]
            h = np.sin(w["frequency"] * (h @ inner + bias))
        taps[lag] = (h @ w["out_weight"][direction]) * window(lag / max(1, max_len - 1), D)
    return taps


def window(t: float, channels: int) -> Array:
    """Decay at a share t of the longest lag: 0.01 at 1.5 in the first channel, 0.3 in the last."""
    rates = np.linspace(np.log(0.01) / 1.5, np.log(0.01) / 0.3, channels)
    return np.exp(-t * np.abs(rates))


def features(max_len: int, count: int) -> Array:
    """The lag, cosines and negative sines of it, (max_len, count)."""
    bands = (count - 1) // 2
    rows = np.zeros((max_len, count))
    for n in range(max_len):
        rows[n, 0] = n / (max_len - 1)
        for band, f in enumerate(np.linspace(1e-4, bands - 1, bands)):
            rows[n, 1 + band] = np.cos(f * 2 * np.pi * n / max_len)
            rows[n, 1 + bands + band] = -np.sin(f * 2 * np.pi * n / max_len)
    return rows


def product(first: Array, second: Array) -> Array:
    """A Monarch matrix of square blocks: m[b s + l, b k + p] = second[l, s, k] first[k, l, p]."""
    b = first.shape[0]
    matrix = np.zeros((b * b, b * b))
    for s in range(b):
        for l in range(b):  # noqa: E741
            for k in range(b):
                for p in range(b):
                    matrix[b * s + l, b * k + p] = second[l, s, k] * first[k, l, p]
    return matrix


def causal_product(inside: Array, first: Array, second: Array, block: int) -> Array:
    """The causal Monarch matrix of one head from its entries, each list of them row by row."""
    blocks = inside.shape[0]
    matrix = np.zeros((blocks * block, blocks * block))
    for t in range(blocks * block):
        for s in range(t + 1):
            T, i, S, j = t // block, t % block, s // block, s % block
            if T == S:
                matrix[t, s] = inside[T, i * (i + 1) // 2 + j]
            else:
                matrix[t, s] = second[i, T * (T - 1) // 2 + S] * first[S, i, j]
    return matrix


def dft_factors(n1: int, n2: int) -> tuple[Array, Array]:
    """Monarch factors of the DFT of n1 n2 points, for inputs read as [n1, n2] and transposed."""
    n = n1 * n2
    first = np.zeros((n2, n1, n1), dtype=complex)
    for low in range(n2):
        for k in range(n1):
            for high in range(n1):
                first[low, k, high] = np.exp(-2j * np.pi * (high * k / n1 + low * k / n))
    second = np.zeros((n1, n2, n2), dtype=complex)
    for k in range(n2):
        for low in range(n2):
            second[:, k, low] = np.exp(-2j * np.pi * low * k / n2)
    return first, second
