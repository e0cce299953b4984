# The language of Triton kernels is not Python to a type checker.
# pyright: reportArgumentType=false, reportOperatorIssue=false
"""The gradients of attention to listed key blocks as Triton kernels, without atomics.

Source: Dao 2023, "FlashAttention-2", section 3.2. The kernel for queries loops like the forward
kernel. In the kernel for keys and values a program handles one tile of keys and loops over the rows
that see it: those whose lists contain it, from lists sorted by key, then those that have it in the
window or as a sink. The order is fixed, so results are deterministic. Sorted lists take 8 bytes per
entry, 20 during sorting. Not yet run on a GPU: tested in Triton's interpreter, compiled ahead of
time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_sparse_attention_triton import (
    compiled,
    is_wide,
    operands,
    products_of,
    row_tile,
    seen_slots,
    slots_of,
    widths,
)
from kernels.attention.block_sparse_operator import BlockSparseSizes
from kernels.attention.interval_attention_triton import load_rows, products, store_rows
from kernels.triton_launch import launch

# Tile sizes (keys, rows) and warps by (float32 operands, heads wider than 64).
KEYS = {
    (False, False): (16, 32, 4),
    (False, True): (16, 32, 4),
    (True, False): (16, 32, 4),
    (True, True): (16, 16, 8),
}
# Sorting key of an empty entry, after all others.
NONE = 2**31 - 1


@triton.jit
def _query_kernel(
    d_outputs, q, k, v, kept, positions, begins, outputs, logs, d_q, carried,
    K, R, G, n_sink, window, scale,
    KEY_BLOCK: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The gradient of queries; also writes sum(outputs * d_outputs) per row for the key kernel."""
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    rows = first + tl.arange(0, ROWS)
    real = rows < R
    position = tl.load(positions + item * R + rows, mask=real, other=-1)
    near_place = tl.load(positions + item * R + first) - window + 1
    begin = tl.load(begins + item)
    at_q, keys, values = q + item * R * P, k + begin * P, v + begin * Q
    at_d = d_outputs + item * R * Q
    query = load_rows(at_q, rows, real, P, P, PP, DOT)
    given = load_rows(at_d, rows, real, Q, Q, QQ, DOT)
    mixed = load_rows(outputs + item * R * Q, rows, real, Q, Q, QQ, tl.float32)
    moment = tl.sum(given.to(tl.float32) * mixed, axis=1)
    tl.store(carried + item * R + rows, moment, mask=real)
    log = tl.load(logs + item * R + rows, mask=real, other=0.0)
    d_query = tl.zeros((ROWS, PP), tl.float32)
    for start in range(0, K * KEY_BLOCK + n_sink + window + ROWS - 1, COLUMNS):
        places, near = slots_of(kept + item * K, near_place, start, K, n_sink, KEY_BLOCK, COLUMNS)
        seen = seen_slots(position, places, near, window)
        there = tl.max(seen.to(tl.int32), axis=0) > 0
        key = load_rows(keys, places, there, G * P, P, PP, DOT)
        scores = scale * products(
            query, key, at_q, keys, rows, places, real, there, P, G * P, P, PART, DOT
        )
        share = tl.exp(tl.where(seen, scores - log[:, None], float("-inf")))
        value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
        d_share = products(
            given, value, at_d, values, rows, places, real, there, Q, G * Q, Q, PART, DOT
        )
        # dS = P * (dP - rowsum(dO * O)) (Dao 2023, algorithm 2).
        d_score = tl.where(seen, share * (d_share - moment[:, None]), 0.0)
        d_query += tl.dot(d_score.to(DOT), key, input_precision="ieee")
    store_rows(d_q + item * R * P, d_query * scale, rows, real, P, P, PP)


@triton.jit
def _behind(places, rows, real, positions, starts, R):
    """Distance from each key of the tile to each row, and the key's position in its document."""
    position = tl.load(positions + rows, mask=real, other=-1)
    place = places[:, None] - tl.load(starts + rows // R, mask=real, other=0)[None, :]
    behind = tl.where(real[None, :] & (place >= 0), position[None, :] - place, -1)
    return behind, place


@triton.jit
def _pull(
    d_key, d_value, key, value, keys, values, places, there, G,
    q, d_outputs, logs, carried, rows, seen, scale,
    P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr,
    DOT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add the contribution of some rows to the gradients of a tile of keys and values."""
    some = tl.max(seen.to(tl.int32), axis=0) > 0
    query = load_rows(q, rows, some, P, P, PP, DOT)
    given = load_rows(d_outputs, rows, some, Q, Q, QQ, DOT)
    log = tl.load(logs + rows, mask=some, other=0.0)
    moment = tl.load(carried + rows, mask=some, other=0.0)
    scores = scale * products(
        key, query, keys, q, places, rows, there, some, G * P, P, P, PART, DOT
    )
    d_share = products(
        value, given, values, d_outputs, places, rows, there, some, G * Q, Q, Q, PART, DOT
    )
    # A non-finite row would reach keys of other documents in the products, as 0 * NaN is NaN. It is
    # zeroed there, and a NaN is added to its shares of the keys that do see it. `nan_or_zero` is 0
    # for a finite row.
    nan_or_zero = 0 * (tl.sum(query.to(tl.float32), axis=1) + tl.sum(given.to(tl.float32), axis=1))
    share = tl.exp(tl.where(seen, scores - log[None, :], float("-inf")))
    share = tl.where(seen, share + nan_or_zero[None, :], 0.0)
    finite = (nan_or_zero == 0)[:, None]
    d_value += tl.dot(share.to(DOT), tl.where(finite, given, 0.0).to(DOT), input_precision="ieee")
    d_score = tl.where(seen, share * (d_share - moment[None, :]), 0.0)
    d_key += tl.dot(d_score.to(DOT), tl.where(finite, query, 0.0).to(DOT), input_precision="ieee")
    return d_key, d_value


@triton.jit
def _key_kernel(
    d_outputs, q, k, v, positions, starts, named_by, names, bounds, logs, carried, d_k, d_v,
    S, G, H, N, K, R, n_sink, window, scale,
    KEY_BLOCK: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, summed over lists and then over rows in order."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, own_items = pair // G, pair * (H // G) * N
    places = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = places < S
    at = row * S * G + pair % G
    keys, values = k + at * P, v + at * Q
    key = load_rows(keys, places, there, G * P, P, PP, DOT)
    value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
    d_key = tl.zeros((COLUMNS, PP), tl.float32)
    d_value = tl.zeros((COLUMNS, QQ), tl.float32)
    at_bounds = bounds + (pair * tl.num_programs(0) + tile) * 6
    end = tl.load(at_bounds + 1) * R
    for i in range(tl.load(at_bounds) * R, end, ROWS):
        which = i + tl.arange(0, ROWS)
        real = which < end
        entry = own_items * K + which // R
        item = own_items + tl.load(named_by + entry, mask=real, other=0)
        rows = item * R + which % R
        within = places[:, None] - tl.load(names + entry, mask=real, other=0)[None, :]
        behind, place = _behind(places, rows, real, positions, starts, R)
        seen = (within >= 0) & (within < KEY_BLOCK) & (behind >= window) & (place >= n_sink)
        d_key, d_value = _pull(
            d_key, d_value, key, value, keys, values, places, there, G,
            q, d_outputs, logs, carried, rows, seen, scale, P, Q, PP, QQ, DOT, PART,
        )  # fmt: skip
    # Then, per query head, the rows that have the tile in the window, and those as sinks.
    for walk in range(2 * (H // G)):
        head, of_sinks = walk // 2, walk % 2
        end = tl.load(at_bounds + 3 + 2 * of_sinks)
        for i in range(tl.load(at_bounds + 2 + 2 * of_sinks), end, ROWS):
            which = i + tl.arange(0, ROWS)
            real = which < end
            rows = (own_items + head * N) * R + which
            behind, place = _behind(places, rows, real, positions, starts, R)
            in_window = (behind >= 0) & (behind < window)
            is_sink = (behind >= window) & (place < n_sink)
            seen = tl.where(of_sinks == 1, is_sink, in_window)
            d_key, d_value = _pull(
                d_key, d_value, key, value, keys, values, places, there, G,
                q, d_outputs, logs, carried, rows, seen, scale, P, Q, PP, QQ, DOT, PART,
            )  # fmt: skip
    store_rows(d_k + at * P, d_key * scale, places, there, G * P, P, PP)
    store_rows(d_v + at * Q, d_value, places, there, G * Q, Q, QQ)


def backward(
    d_outputs: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, positions: Tensor,
    begins: Tensor, outputs: Tensor, logs: Tensor, *sizes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Start the backward kernels; arguments and results are those of the operator."""
    (M, R, P), K, lists = q.shape, kept.shape[1], BlockSparseSizes(*sizes)
    B, H, G, key_block, n_sink, window = lists
    S, Q = len(k) // (B * G), v.shape[1]
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    carried, tile = torch.empty_like(logs), row_tile(q, k, v)
    launch(
        _query_kernel,
        (M, triton.cdiv(R, tile["ROWS"])),
        d_outputs, q, k, v, kept, positions, begins, outputs, logs, d_q, carried,
        K, R, G, n_sink, window, P**-0.5,
        flops=2 * M * products_of(R, K, lists, tile) * (2 * P + Q), KEY_BLOCK=key_block, **tile,
    )  # fmt: skip
    tile = _key_tile(q, k, v)
    starts = begins.view(B, -1) // G - S * torch.arange(B, device=q.device)[:, None]
    names, named_by = _sorted_lists(kept, starts, lists)
    edges = torch.arange(0, S, tile["COLUMNS"], device=q.device)
    bounds = [*_naming(names, edges, tile["COLUMNS"], key_block)]
    bounds += _seeing(positions, starts, edges, tile["COLUMNS"], lists)
    # Pairs multiplied: a whole tile of keys per row and list entry, and for sinks and window.
    met = M * R * (K * tile["COLUMNS"] + window + 2 * tile["COLUMNS"])
    launch(
        _key_kernel,
        (len(edges), B * G),
        d_outputs, q, k, v, positions, starts.int(), named_by, names, torch.stack(bounds, dim=2),
        logs, carried, d_k, d_v, S, G, H, M // (B * H), K, R, n_sink, window, P**-0.5,
        flops=4 * met * (P + Q), KEY_BLOCK=key_block, **tile,
    )  # fmt: skip
    return d_q, d_k, d_v


def _sorted_lists(kept: Tensor, starts: Tensor, lists: BlockSparseSizes) -> tuple[Tensor, Tensor]:
    """The first keys of all listed blocks, sorted, and the query blocks that list them, (B G, E).

    Keys are indexed within their row of the batch, query blocks among those of the key head.
    """
    pairs, K = lists.B * lists.G, kept.shape[1]
    first = kept * lists.key_block + starts.view(-1, 1).int()
    first = torch.where(kept >= 0, first, NONE).view(pairs, -1)
    names, order = first.sort(dim=1, stable=True)
    return names, (order // max(1, K)).int()


def _naming(names: Tensor, edges: Tensor, columns: int, key_block: int) -> tuple[Tensor, Tensor]:
    """Bounds of the sorted entries that list a key of each tile, (B G, T)."""
    begins = edges.to(names.dtype).expand(len(names), -1)
    # A block that begins up to key_block - 1 keys before the tile overlaps it.
    low = torch.searchsorted(names, (begins - key_block).contiguous(), right=True)
    return low, torch.searchsorted(names, (begins + columns).contiguous())


def _seeing(
    positions: Tensor, starts: Tensor, edges: Tensor, columns: int, lists: BlockSparseSizes
) -> list[Tensor]:
    """Bounds of the rows with a key of each tile in the window, and as a sink, (B G, T) each."""
    B, H, G = lists[:3]
    R = positions.shape[1]
    # Positions are equal in all heads.
    begun = starts.view(B, H, -1)[:, 0, :, None].expand(-1, -1, R).flatten(1)
    begun = begun.contiguous()
    token = begun + positions.view(B, H, -1)[:, 0]
    begins, ends = (x.expand(B, -1).contiguous() for x in (edges, edges + columns))
    bounds = [
        torch.searchsorted(token, begins),
        torch.searchsorted(token, ends + lists.window - 1),
        torch.searchsorted(begun, begins - lists.n_sink, right=True),
        torch.searchsorted(begun, ends),
    ]
    return [x.repeat_interleave(G, dim=0) for x in bounds]


def _key_tile(q: Tensor, k: Tensor, v: Tensor) -> dict:
    """Compile-time constants of the key kernel."""
    wide, (dot, part) = widths(q, v), operands(q, k, v)
    columns, rows, warps = KEYS[dot == tl.float32, is_wide(wide)] if compiled() else (64, 64, 4)
    return {**wide, "ROWS": rows, "COLUMNS": columns, "DOT": dot, "PART": part, "num_warps": warps}
