"""Sliding-window softmax attention, with work and memory linear in the length.

Source: Beltagy et al. 2020, "Longformer", section 3.1. A window of W is exactly W keys, the query's
own included: query i sees key j if 0 <= i - j <= W - 1. The kernels of `interval_attention` compute
it, on GPU and CPU, and keep no probabilities. In float64 and without a compiler it is computed in
blocks by plain torch, which keeps the probabilities of every window.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.attention.interval_attention import Intervals, interval_attention, neighbours
from kernels.dispatch import Path, path_of
from kernels.precision import without_autocast

# Queries per block in plain torch.
BLOCK = 64
# Up to this many queries, as in decoding, a single masked product is faster than tiles.
FEW = 16


def window_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to the last `window` keys of its document, its own included.

    Scores are scaled by 1/sqrt(P). Computes in float32 or wider, whatever autocast says, and
    returns the dtype of `queries`.

    Args:
        queries: queries of the last L of the S tokens.
        keys: one per token; G divides H, and query head h reads key head h // (H / G).
        values: one per token.
        window: most keys that a query sees.
        documents: document of each of the S tokens; one document if not given.

    Raises:
        ValueError: there are fewer keys than queries, or the window is empty.
    """
    L, S = queries.shape[1], keys.shape[1]
    if window < 1 or S < L:
        raise ValueError(
            f"window {window} with {L} queries on {S} keys; take a window of 1 or more, and at "
            "least as many keys as queries"
        )
    before = min(window, S) - 1
    # Keys before the first query's window are cut off.
    unseen = max(S - L - before, 0)
    keys, values = keys[:, unseen:], values[:, unseen:]
    if documents is not None:
        documents = documents[:, unseen:]
    if L <= FEW:
        return _attend_few(queries, keys, values, window, documents)
    return _attend(queries, keys, values, documents, (before, 0))


def centred_window_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B L G P"],
    values: Float[Tensor, "B L G Q"],
    window: int,
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend as `window_attention` does, but on both sides: query i sees |i - j| <= window - 1.

    Raises:
        ValueError: the window is empty.
    """
    if window < 1:
        raise ValueError(f"window {window} is empty; take 1 or more")
    reach = min(window, queries.shape[1]) - 1
    return _attend(queries, keys, values, documents, (reach, reach))


def window_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Compute `window_attention` with a dense mask."""
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2).to(queries.dtype),
        values.transpose(1, 2).to(queries.dtype),
        attn_mask=_visible(queries.shape[1], keys.shape[1], window, documents, queries.device),
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2)


def _attend_few(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, documents: Tensor | None
) -> Float[Tensor, "B L H Q"]:
    wide = torch.promote_types(queries.dtype, torch.float32)
    with without_autocast(queries):
        q, k, v = (x.to(wide) for x in (queries, keys, values))
        mixed = window_attention_reference(q, k, v, window, documents)
    return mixed.to(queries.dtype)


def _visible(
    L: int, S: int, window: int, documents: Tensor | None, device: torch.device
) -> Bool[Tensor, "..."]:
    place = torch.arange(S, device=device)
    behind = place[S - L :, None] - place[None, :]
    near = (behind >= 0) & (behind < window)
    if documents is None:
        return near
    return (near & (documents[:, S - L :, None] == documents[:, None, :]))[:, None]


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, reach: tuple[int, int]
) -> Float[Tensor, "B L H Q"]:
    """Attend to `reach` keys before and after each query's own."""
    L, S = queries.shape[1], keys.shape[1]
    ids = queries.new_zeros((1, S), dtype=torch.int32) if documents is None else documents
    if path_of(queries) is Path.REFERENCE and not queries.is_meta:
        return _attend_in_blocks(queries, keys, values, neighbours(ids, L, *reach))
    return interval_attention(queries, keys, values, neighbours(ids, L, *reach))


def _attend_in_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Intervals
) -> Float[Tensor, "B L H Q"]:
    """Attend in plain torch, by blocks of queries that do not cross documents."""
    L, wide = queries.shape[1], torch.promote_types(queries.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (queries, keys, values))
    firsts, pasts = (x.expand(len(q), L).tolist() for x in seen)
    rows = []
    with without_autocast(queries):
        for row, first, past in zip(range(len(q)), firsts, pasts, strict=True):
            parts = [
                _attend_block(q[row, block], k[row], v[row], first[block], past[block])
                for block in _blocks(first, past)
            ]
            rows.append(torch.cat(parts))
    return torch.stack(rows).to(queries.dtype)


def _blocks(first: list[int], past: list[int]) -> Iterator[slice]:
    """Blocks of consecutive queries, each of which shares keys with the one before it."""
    begin = 0
    for t in range(1, len(first) + 1):
        if t == len(first) or first[t] >= past[t - 1] or t - begin == BLOCK:
            yield slice(begin, t)
            begin = t


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, first: list[int], past: list[int]
) -> Float[Tensor, "C H Q"]:
    seen = slice(first[0], past[-1])
    place = torch.arange(seen.start, seen.stop, device=q.device)
    low, high = (torch.tensor(x, device=q.device)[:, None] for x in (first, past))
    mixed = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k[seen], v[seen])),  # pyright: ignore[reportArgumentType]
        attn_mask=(place >= low) & (place < high),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return mixed[0].transpose(0, 1)
