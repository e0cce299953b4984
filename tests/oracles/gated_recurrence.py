"""Gated recurrences and their hybrid with window attention, as float64 loops over tokens."""

import numpy as np
from scipy.special import ndtr

from tests.oracles.mixers import convolve, turned

Array = np.ndarray


def gated_recurrence(weights: dict[str, Array], x: Array, documents: Array, mode: str) -> Array:
    """Griffin's recurrent block (De et al. 2024, sections 2.3 and 2.4), one row (L, D)."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    stacked = x.astype(np.float64) @ w["in_proj.weight"].T
    inner, gate = np.split(stacked, 2, axis=1)
    u = convolve(inner, w["conv.weight"], w["conv.bias"], documents)
    decay, write = gates(w, "gates", u, documents, mode)
    h = states(decay, write * u, documents)
    return (h * gelu(gate)) @ w["out_proj.weight"].T


def hybrid(
    weights: dict[str, Array], x: Array, documents: Array, heads: int, window: int, mode: str
) -> Array:
    """Card C.4 with RoPE theta 1e4 and branch norms, one row (L, D), head by head."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = x.astype(np.float64)
    L, D = x.shape
    P = D // heads
    q, k, v = np.split(x @ w["qkv.weight"].T, 3, axis=1)
    u = convolve(k, w["conv.weight"], w["conv.bias"], documents)
    decay, write = gates(w, "gates", u, documents, mode)
    candidate = np.tanh(block_diagonal(w, "candidate", u))
    h = states(decay, write * candidate * v, documents)
    local = np.zeros((L, D))
    for t in range(L):
        for g in range(heads):
            own = slice(g * P, (g + 1) * P)
            seen = [s for s in range(max(0, t - window + 1), t + 1) if documents[s] == documents[t]]
            query = turned(q[t, own], t, 1e4)
            scores = np.array([query @ turned(k[s, own], s, 1e4) for s in seen]) / np.sqrt(P)
            share = np.exp(scores - scores.max())
            local[t, own] = (share / share.sum()) @ v[seen, own]
    alpha = sigmoid(x @ w["alpha.weight"].T + w["alpha_bias"])
    merged = np.zeros((L, D))
    for t in range(L):
        for g in range(heads):
            own = slice(g * P, (g + 1) * P)
            one = _normed(local[t, own]) * w["norms.0.weight"][own]
            two = _normed(h[t, own]) * w["norms.1.weight"][own]
            merged[t, own] = alpha[t, g] * one + (1 - alpha[t, g]) * two
    return merged @ w["out.weight"].T


def gates(
    w: dict[str, Array], at: str, u: Array, documents: Array, mode: str
) -> tuple[Array, Array]:
    """Decays and factors of what is written, (L, E) each, for RG-LRU or minGRU."""
    if mode == "mingru":
        z = sigmoid(block_diagonal(w, f"{at}.update_gate", u))
        return 1 - z, z
    r = sigmoid(block_diagonal(w, f"{at}.recurrence_gate", u))
    i = sigmoid(block_diagonal(w, f"{at}.input_gate", u))
    decay = np.exp(-8 * r * np.log1p(np.exp(w[f"{at}.Lambda"])))
    scale = np.sqrt(1 - decay**2)
    for t in range(len(u)):
        if t == 0 or documents[t] != documents[t - 1]:
            scale[t] = 1
    return decay, scale * i


def states(decay: Array, written: Array, documents: Array) -> Array:
    """h[t] = decay[t] h[t-1] + written[t], from zero in every document."""
    h = np.zeros(written.shape)
    for t in range(len(written)):
        continues = t > 0 and documents[t] == documents[t - 1]
        h[t] = (decay[t] * h[t - 1] if continues else 0) + written[t]
    return h


def matrix(decay: Array, write: Array, documents: Array) -> Array:
    """The recurrence's matrix of each channel, (E, L, L), entry by entry."""
    L, E = decay.shape
    found = np.zeros((E, L, L))
    for t in range(L):
        for s in range(t + 1):
            if documents[t] == documents[s]:
                found[:, t, s] = decay[s + 1 : t + 1].prod(axis=0) * write[s]
    return found


def block_diagonal(w: dict[str, Array], at: str, x: Array) -> Array:
    """A map with a bias, each block of channels by itself."""
    pieces = np.split(x, len(w[f"{at}.weight"]), axis=1)
    mapped = [own @ block.T for own, block in zip(pieces, w[f"{at}.weight"], strict=True)]
    return np.concatenate(mapped, axis=1) + w[f"{at}.bias"]


def counted_recurrence_flops(length: int, channels: int) -> int:
    """Pointwise operations of the recurrence, counted one at a time in the loop that does them."""
    count = 0
    for _ in range(length):
        for _ in range(channels):
            count += 1  # exponential of the log decay
            count += 1  # write * v
            count += 2  # decay * h, their sum
    return count


def visible_pairs(queries: int, keys: int, window: int) -> int:
    """Query-key pairs of the last `queries` of `keys` tokens under a window, counted one by one."""
    return sum(
        1 for i in range(keys - queries, keys) for j in range(keys) if 0 <= i - j <= window - 1
    )


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """x times the standard normal distribution function of x."""
    return x * ndtr(x)


def _normed(x: Array) -> Array:
    return x / np.sqrt(np.mean(x * x) + 1e-5)
