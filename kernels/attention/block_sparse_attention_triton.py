"""Attention to listed key blocks as a Triton kernel that gathers keys on chip.

Source: Dao 2023, "FlashAttention-2", section 3.1, with the keys of Lee et al. 2024, "HiP
Attention", section 3.3. A program handles the rows of a query block and loops over its slots:
listed keys, sinks and window (gradients: `block_sparse_attention_backward_triton`). Sums have a
fixed order, and there are no atomics. Softmax statistics and sums are float32; products are as in
`interval_attention`. A product takes at least 16 rows, so a block of one row wastes 15. Arithmetic
intensity is low: memory bandwidth bounds the speed. Not yet run on a GPU: tested in Triton's
interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_sparse_operator import BlockSparseSizes
from kernels.attention.interval_attention_triton import PART, load_rows, products, store_rows
from kernels.triton_launch import interpreting, is_recording, launch

# Tile sizes (rows at most, slots) and warps by (float32 operands, heads wider than 64), for blocks
# of up to 16 rows and for longer ones. No spills on sm_80, sm_90 and sm_100 with heads of 64 and
# 128.
SHORT = {
    (False, False): (16, 64, 4),
    (False, True): (16, 64, 4),
    (True, False): (16, 16, 8),
    (True, True): (16, 16, 8),
}
LONG = {
    (False, False): (32, 32, 4),
    (False, True): (32, 32, 4),
    (True, False): (32, 16, 4),
    (True, True): (32, 16, 8),
}


@triton.jit
def slots_of(
    kept, near_place, start, K, n_sink, KEY_BLOCK: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Positions of the keys in some slots, negative for none, and which slots are the window's."""
    slot = start + tl.arange(0, COLUMNS)
    block = tl.load(kept + slot // KEY_BLOCK, mask=slot < K * KEY_BLOCK, other=-1)
    listed = block * KEY_BLOCK + slot % KEY_BLOCK
    # Sinks are read from their own slots.
    listed = tl.where((block >= 0) & (listed >= n_sink), listed, -1)
    past_lists = slot - K * KEY_BLOCK
    past_sinks = past_lists - n_sink
    places = tl.where(past_lists < 0, listed, past_lists)
    near = past_sinks >= 0
    return tl.where(near, near_place + past_sinks, places), near


@triton.jit
def seen_slots(position, places, near, window) -> tl.tensor:
    """Mask of the slots that each row sees; a key in its window counts in that slot only."""
    behind = position[:, None] - places[None, :]
    in_window = behind < window
    return (places >= 0)[None, :] & (behind >= 0) & (in_window == near[None, :])


@triton.jit
def _forward_kernel(
    q, k, v, kept, positions, begins, outputs, logs, K, R, G, n_sink, window, scale,
    KEY_BLOCK: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    rows = first + tl.arange(0, ROWS)
    real = rows < R
    position = tl.load(positions + item * R + rows, mask=real, other=-1)
    # The oldest key in the window of the tile's first row: slots of the window count from here.
    near_place = tl.load(positions + item * R + first) - window + 1
    begin = tl.load(begins + item)
    at_q, keys, values = q + item * R * P, k + begin * P, v + begin * Q
    query = load_rows(at_q, rows, real, P, P, PP, DOT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, QQ), tl.float32)
    # Lists, sinks, and the union of the windows of ROWS consecutive rows.
    for start in range(0, K * KEY_BLOCK + n_sink + window + ROWS - 1, COLUMNS):
        places, near = slots_of(kept + item * K, near_place, start, K, n_sink, KEY_BLOCK, COLUMNS)
        seen = seen_slots(position, places, near, window)
        there = tl.max(seen.to(tl.int32), axis=0) > 0
        key = load_rows(keys, places, there, G * P, P, PP, DOT)
        scores = scale * products(
            query, key, at_q, keys, rows, places, real, there, P, G * P, P, PART, DOT
        )
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # A row without any key so far: -inf minus -inf would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        share, left = tl.exp(scores - level[:, None]), tl.exp(top - level)
        value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
        added = tl.dot(share.to(DOT), value, input_precision="ieee")
        mixed = mixed * left[:, None] + added
        total = total * left + tl.sum(share, axis=1)
        top = higher
    # Padding rows have a sum of 0. Not `total > 0`, which would turn a NaN into a 1.
    some = tl.where(total == 0, 1.0, total)
    store_rows(outputs + item * R * Q, mixed / some[:, None], rows, real, Q, Q, QQ)
    tl.store(logs + item * R + rows, top + tl.log(some), mask=real)


def forward(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, positions: Tensor, begins: Tensor, *sizes: int
) -> tuple[Tensor, Tensor]:
    """Start the forward kernel; arguments and results are those of the operator."""
    (M, R, P), (K, Q), lists = q.shape, (kept.shape[1], v.shape[1]), BlockSparseSizes(*sizes)
    outputs, logs = v.new_empty(M, R, Q), q.new_empty(M, R, dtype=torch.float32)
    tile = row_tile(q, k, v)
    launch(
        _forward_kernel,
        (M, triton.cdiv(R, tile["ROWS"])),
        q, k, v, kept, positions, begins, outputs, logs,
        K, R, lists.G, lists.n_sink, lists.window, P**-0.5,
        flops=2 * M * products_of(R, K, lists, tile) * (P + Q), KEY_BLOCK=lists.key_block, **tile,
    )  # fmt: skip
    return outputs, logs


def products_of(R: int, K: int, lists: BlockSparseSizes, tile: dict) -> int:
    """Row-slot pairs that the tiles of one query block multiply, including empty rows."""
    rows = triton.cdiv(R, tile["ROWS"]) * tile["ROWS"]
    return rows * (K * lists.key_block + lists.n_sink + lists.window)


def row_tile(q: Tensor, k: Tensor, v: Tensor) -> dict:
    """Compile-time constants of the row kernels."""
    wide, (dot, part) = widths(q, v), operands(q, k, v)
    table = SHORT if q.shape[1] <= 16 else LONG
    rows, columns, warps = table[dot == tl.float32, is_wide(wide)]
    if not compiled():
        rows, columns = min(64, max(16, triton.next_power_of_2(q.shape[1]))), 64
    return {**wide, "ROWS": rows, "COLUMNS": columns, "DOT": dot, "PART": part, "num_warps": warps}


def operands(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """The operand dtype of products, and the channels per partial product, 0 for all."""
    narrow = compiled() and all(x.dtype is torch.bfloat16 for x in (q, k, v))
    return (tl.bfloat16, 0) if narrow else (tl.float32, PART if is_wide(widths(q, v)) else 0)


def widths(q: Tensor, v: Tensor) -> dict[str, int]:
    """Channels of queries and values, and their padded sizes."""
    P, Q = q.shape[2], v.shape[1]
    padded = (max(16, triton.next_power_of_2(x)) for x in (P, Q))
    return dict(zip(("P", "Q", "PP", "QQ"), (P, Q, *padded), strict=True))


def is_wide(sizes: dict[str, int]) -> bool:
    """Whether heads are wider than 64."""
    return max(sizes["PP"], sizes["QQ"]) > 64


def compiled() -> bool:
    """Whether kernels are compiled (or recorded), not interpreted."""
    return is_recording() or not interpreting()
