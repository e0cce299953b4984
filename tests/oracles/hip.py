"""HiP attention as float64 loops: searches of a query block, attention key by key, the mixer."""

import math

import numpy as np

from tests.oracles.mixers import normed, turned

Array = np.ndarray


def tree(scores: Array, rows: Array, kept: int, key_block: int, oracle: bool = False) -> list[int]:
    """Key blocks that the tree search keeps for query rows at these places of their document.

    `scores[r, t]` is the product of row r's query with key t; Lee et al. 2024, algorithm 1.
    """
    n = int(rows[-1]) + 1
    blocks = math.ceil(n / key_block)
    if kept >= blocks:
        return list(range(blocks))
    ranges = [(j * blocks // kept, (j + 1) * blocks // kept) for j in range(kept)]
    while max(b - a for a, b in ranges) > 1:
        children = halves(ranges)
        judged = []
        for a, b in children:
            centre = (a + b - 1) // 2
            judged_blocks = range(a, b) if oracle else [centre]
            keys = [t for c in judged_blocks for t in range(c * key_block, (c + 1) * key_block)]
            judged.append(best(scores, rows, keys))
        ranges = strongest(children, judged, kept)
    return [a for a, _ in ranges]


def staged(
    scores: Array,
    rows: Array,
    stages: list[tuple[int, int]],
    region: tuple[int, int],
    key_block: int,
    oracle: bool = False,
) -> list[int]:
    """Key blocks that survive stages (chunk in key blocks, chunks kept) within keys [low, high).

    A chunk is judged by the key that a top-1 halving search finds in it (Lee et al. 2025, 3.1).
    """
    low, high = region
    whole = stages[0][0] * key_block
    survivors = [(c * whole, (c + 1) * whole) for c in range(math.ceil(max(high, 0) / whole))]
    for chunk, keep in stages:
        length = chunk * key_block
        pieces = [(a, a + length) for begin, end in survivors for a in range(begin, end, length)]
        pieces = [(a, b) for a, b in pieces if max(a, low) < min(b, high)]
        judged = []
        for a, b in pieces:
            a, b = max(a, low), min(b, high)
            keys = range(a, b) if oracle else [halving(scores, rows, a, b)]
            judged.append(best(scores, rows, keys))
        survivors = strongest(pieces, judged, keep)
    return [a // key_block for a, _ in survivors]


def halving(scores: Array, rows: Array, a: int, b: int) -> int:
    """The key that a search for the largest score ends at, halving [a, b) by centre keys."""
    while b - a > 1:
        (c, d), (e, f) = halves([(a, b)])
        left = best(scores, rows, [(c + d - 1) // 2])
        right = best(scores, rows, [(e + f - 1) // 2])
        a, b = (e, f) if right > left else (c, d)
    return a


def halves(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each range cut in the middle, the left half not the shorter; empty halves left out."""
    cut = [(a, b, (a + b + 1) // 2) for a, b in ranges]
    both = [half for a, b, m in cut for half in ((a, m), (m, b))]
    return [(a, b) for a, b in both if a < b]


def best(scores: Array, rows: Array, keys: list[int] | range) -> float:
    """The largest score of any row with any of these keys that the row may see."""
    seen = [scores[r, t] for r, place in enumerate(rows) for t in keys if t <= place]
    return max(seen, default=-math.inf)


def strongest(
    ranges: list[tuple[int, int]], judged: list[float], kept: int
) -> list[tuple[int, int]]:
    """The ranges with the largest scores, the earlier of equals, in order."""
    order = sorted(range(len(ranges)), key=lambda i: (-judged[i], ranges[i]))
    return sorted(ranges[i] for i in order[:kept])


def exact_top(scores: Array, rows: Array, kept: int, key_block: int) -> list[int]:
    """The key blocks with the largest scores of all, the earlier of equals."""
    blocks = [(c, c + 1) for c in range(math.ceil((rows[-1] + 1) / key_block))]
    judged = [best(scores, rows, range(c * key_block, d * key_block)) for c, d in blocks]
    return [a for a, _ in strongest(blocks, judged, kept)]


def seen_keys(place: int, blocks: list[int], key_block: int, n_sink: int, window: int) -> list[int]:
    """Keys of a row: listed blocks, sinks and window, each key once and none after the row."""
    listed = {c * key_block + j for c in blocks if c >= 0 for j in range(key_block)}
    keys = listed | set(range(n_sink)) | set(range(max(0, place - window + 1), place + 1))
    return sorted(t for t in keys if t <= place)


def attend(query: Array, keys: Array, values: Array, seen: list[int]) -> Array:
    """One row of softmax attention over the keys that are seen."""
    scores = np.array([query @ keys[t] for t in seen]) / np.sqrt(len(query))
    share = np.exp(scores - scores.max())
    return (share / share.sum()) @ values[seen]


def hip(
    weights: dict[str, Array], x: Array, documents: Array, heads: tuple[int, int], sizes: dict
) -> Array:
    """The whole mixer on one row (L, D), document by document.

    `heads` are those of queries and of keys; `sizes` holds k, key_block, n_sink, window, and
    query_block (rows that choose together) or refresh (rows that reuse the first one's choice),
    and stages for the staged search.
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    out = np.zeros(x.shape)
    for document in np.unique(documents):
        inside = documents == document
        out[inside] = _document(w, x[inside].astype(np.float64), heads, sizes)
    return out


def _document(w: dict[str, Array], x: Array, heads: tuple[int, int], sizes: dict) -> Array:
    (H, G), L = heads, x.shape[0]
    P = w["qkv.weight"].shape[0] // (H + 2 * G)
    stacked = (x @ w["qkv.weight"].T).reshape(L, H + 2 * G, P)
    q, k = np.zeros((L, H, P)), np.zeros((L, G, P))
    for t in range(L):
        for h in range(H):
            q[t, h] = turned(normed(stacked[t, h], w["q_norm.weight"]), t, 1e4)
        for g in range(G):
            k[t, g] = turned(normed(stacked[t, H + g], w["k_norm.weight"]), t, 1e4)
    v = stacked[:, H + G :]
    out = np.zeros((L, H, P))
    for h in range(H):
        g = h // (H // G)
        scores = q[:, h] @ k[:, g].T
        for t in range(L):
            blocks = _chosen(scores, t, sizes)
            seen = seen_keys(t, blocks, sizes["key_block"], sizes["n_sink"], sizes["window"])
            out[t, h] = attend(q[t, h], k[:, g], v[:, g], seen)
    return out.reshape(L, H * P) @ w["out.weight"].T


def _chosen(scores: Array, t: int, sizes: dict) -> list[int]:
    L, refresh = len(scores), sizes.get("refresh", 1)
    width = sizes.get("query_block", refresh)
    first = t - t % width
    together = "query_block" in sizes
    rows = np.arange(first, min(first + width, L)) if together else np.array([first])
    block = sizes["key_block"]
    if "stages" not in sizes:
        return tree(scores[rows], rows, sizes["k"] // block, block)
    last = max(rows[-1], first + refresh - 1)
    region = sizes["n_sink"], min(rows[-1], last - sizes["window"]) + 1
    return staged(scores[rows], rows, sizes["stages"], region, block)
