"""Attention under masks that are built pair by pair, in float64: windows, and SCOUT's checkpoints.

Window: Beltagy et al. 2020, section 3.1. Checkpoints: Jafari et al. 2025, and the authors' release.
"""

import numpy as np

from tests.oracles.mixers import normed, turned

Array = np.ndarray


def near(queries: int, documents: Array, before: int, after: int) -> Array:
    """Which of all tokens each of the last `queries` sees, (B, L, S)."""
    B, S = documents.shape
    mask = np.zeros((B, queries, S), dtype=bool)
    for b in range(B):
        for i in range(S - queries, S):
            first, last = max(i - before, 0), min(i + after, S - 1)
            own = documents[b, first : last + 1] == documents[b, i]
            mask[b, i - S + queries, first : last + 1] = own
    return mask


def places(documents: Array) -> Array:
    """The place of each token in its document."""
    found = np.zeros_like(documents)
    for row, ids in zip(found, documents, strict=True):
        for t in range(1, len(ids)):
            row[t] = row[t - 1] + 1 if ids[t] == ids[t - 1] else 0
    return found


def checkpointed(documents: Array, every: int) -> Array:
    """Which tokens each token sees, (B, L, L): itself, and ends of earlier whole segments."""
    B, L = documents.shape
    at = places(documents)
    mask = np.zeros((B, L, L), dtype=bool)
    for b in range(B):
        for i in range(L):
            ends = (at[b, :i] + 1) % every == 0
            mask[b, i, :i] = ends & (documents[b, :i] == documents[b, i]) & (documents[b, i] >= 0)
            mask[b, i, i] = True
    return mask


def attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention of (B, L, H, P) to what the mask (B, L, S) allows."""
    keys, values = (_by_query_head(x, queries.shape[2]) for x in (keys, values))
    return _heads_last(_shares(queries, keys, mask) @ _heads_first(values))


def gradients(
    queries: Array, keys: Array, values: Array, mask: Array, d_mixed: Array
) -> tuple[Array, Array, Array]:
    """Those of sum(attend(...) * d_mixed) in queries, keys and values."""
    H, G = queries.shape[2], keys.shape[2]
    keys, values = (_by_query_head(x, H) for x in (keys, values))
    share, d_mixed = _shares(queries, keys, mask), _heads_first(d_mixed)
    queries, keys, values = (_heads_first(x) for x in (queries, keys, values))
    d_share = d_mixed @ values.swapaxes(2, 3)
    total = (d_share * share).sum(axis=-1, keepdims=True)
    d_score = share * (d_share - total) / np.sqrt(queries.shape[3])
    d_queries = _heads_last(d_score @ keys)
    d_keys = _heads_last(d_score.swapaxes(2, 3) @ queries)
    d_values = _heads_last(share.swapaxes(2, 3) @ d_mixed)
    return d_queries, _by_key_head(d_keys, G), _by_key_head(d_values, G)


def window_mixer(
    weights: dict[str, Array], x: Array, documents: Array, sizes: tuple[int, int, int, int]
) -> Array:
    """A window mixer's outputs for one row (L, D); sizes: query heads, key heads, before, after."""
    heads, groups, before, after = sizes
    q, k, v = _projected(weights, x, heads, groups)
    at = places(documents[None])[0]
    q, k = (_turned(each, at, 1e4) for each in (q, k))
    mask = near(len(x), documents[None], before, after)
    mixed = attend(q[None], k[None], v[None], mask)[0]
    return mixed.reshape(len(x), -1) @ weights["out.weight"].astype(np.float64).T


def scout_mixer(
    weights: dict[str, Array],
    x: Array,
    documents: Array,
    sizes: tuple[int, int, int],
    pooling: str,
) -> Array:
    """A SCOUT's outputs for one row, token by token; sizes: query heads, key heads, segment."""
    heads, groups, every = sizes
    q, k, v = _projected(weights, x, heads, groups)
    at = places(documents[None])[0]
    turned_q, turned_k = (_turned(each, at, 1e6) for each in (q, k))
    mixed = np.zeros((len(x), heads, v.shape[2]))
    for t in range(len(x)):
        ends = [p for p in range(t) if documents[p] == documents[t] and (at[p] + 1) % every == 0]
        for h in range(heads):
            g = h // (heads // groups)
            keys, values = [turned_k[t, g]], [v[t, g]]
            for p in ends:
                segment = slice(p - every + 1, p + 1)
                share = _pooling_weights(weights, k[segment, g], g, pooling)
                keys.append(turned(share @ k[segment, g], at[p], 1e6))
                values.append(share @ v[segment, g])
            scores = np.array(keys) @ turned_q[t, h] / np.sqrt(q.shape[2])
            weight = np.exp(scores - scores.max())
            mixed[t, h] = weight / weight.sum() @ np.array(values)
    return mixed.reshape(len(x), -1) @ weights["out.weight"].astype(np.float64).T


def _pooling_weights(weights: dict[str, Array], keys: Array, group: int, pooling: str) -> Array:
    every, P = keys.shape
    if pooling == "last":
        return np.eye(every)[-1]
    if pooling == "mean":
        return np.full(every, 1 / every)
    scores = keys @ weights["pool_query"][group].astype(np.float64) / np.sqrt(P)
    share = np.exp(scores - scores.max())
    return share / share.sum()


def _projected(
    weights: dict[str, Array], x: Array, heads: int, groups: int
) -> tuple[Array, Array, Array]:
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    stacked = (x.astype(np.float64) @ w["qkv.weight"].T).reshape(len(x), heads + 2 * groups, -1)
    q, k, v = np.split(stacked, [heads, heads + groups], axis=1)
    if "q_norm.weight" in w:
        q = np.apply_along_axis(normed, 2, q, w["q_norm.weight"])
        k = np.apply_along_axis(normed, 2, k, w["k_norm.weight"])
    return q, k, v


def _turned(x: Array, at: Array, theta: float) -> Array:
    return np.array(
        [[turned(head, t, theta) for head in row] for row, t in zip(x, at, strict=True)]
    )


def _shares(queries: Array, keys: Array, mask: Array) -> Array:
    scores = _heads_first(queries) @ _heads_first(keys).swapaxes(2, 3) / np.sqrt(queries.shape[3])
    scores = np.where(mask[:, None], scores, -np.inf)
    share = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return share / share.sum(axis=-1, keepdims=True)


def _heads_first(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _heads_last(x: Array) -> Array:
    return x.swapaxes(1, 2)


def _by_query_head(x: Array, heads: int) -> Array:
    return np.repeat(x, heads // x.shape[2], axis=2)


def _by_key_head(x: Array, groups: int) -> Array:
    B, S, H, P = x.shape
    return x.reshape(B, S, groups, H // groups, P).sum(axis=3)
