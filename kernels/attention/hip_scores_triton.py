"""Scores of HiP's search as a Triton kernel (Lee et al. 2024, "HiP Attention", algorithm 1).

A program handles some ranges of one list. It multiplies the keys that represent them with the rows
that select together, and keeps the largest score per range, so that a round stores one number per
range and no gathered keys. Products accumulate in float32, as in `interval_attention`, with at
least 16 rows. Keys mostly come from caches, which hold those of one document and head. Not yet run
on a GPU: tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.block_sparse_attention_triton import compiled, operands
from kernels.attention.interval_attention_triton import load_rows, products
from kernels.triton_launch import launch

# Tile sizes (rows at most, ranges) and warps by (float32 operands, heads wider than 64). No spills
# on sm_80, sm_90 and sm_100 with heads of 64 and 128.
TILES = {
    (False, False): (32, 64, 4),
    (False, True): (32, 64, 4),
    (True, False): (32, 16, 4),
    (True, True): (16, 16, 8),
}


@triton.jit
def _score_kernel(
    q, k, positions, begins, firsts, scores, R, J, stride,
    WIDTH: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DOT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    ranges = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = ranges < J
    first = tl.load(firsts + item * J + ranges, mask=there, other=0)
    last = tl.load(positions + item * R + R - 1)
    at_q, keys = q + item * R * P, k + tl.load(begins + item) * P
    best = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(0, R, ROWS):
        rows = start + tl.arange(0, ROWS)
        real = rows < R
        position = tl.load(positions + item * R + rows, mask=real, other=-1)
        query = load_rows(at_q, rows, real, P, P, PP, DOT)
        for within in range(WIDTH):
            place = first + within
            # Clamped to the document; such keys are masked below.
            address = tl.minimum(tl.maximum(place, 0), last)
            key = load_rows(keys, address, there, stride * P, P, PP, DOT)
            found = products(
                query, key, at_q, keys, rows, address, real, there, P, stride * P, P, PART, DOT
            )
            seen = real[:, None] & (place[None, :] <= position[:, None])
            best = tl.maximum(best, tl.max(tl.where(seen, found, float("-inf")), axis=0))
    tl.store(scores + item * J + ranges, best, mask=there)


def forward(
    q: Tensor, k: Tensor, positions: Tensor, begins: Tensor, firsts: Tensor, stride: int, width: int
) -> Tensor:
    """Start the kernel; arguments and result are those of the operator."""
    (M, R, P), J = q.shape, firsts.shape[1]
    scores = q.new_empty(M, J, dtype=torch.float32)
    tile = _tile(q, k)
    rows = triton.cdiv(R, tile["ROWS"]) * tile["ROWS"]
    launch(
        _score_kernel,
        (M, triton.cdiv(J, tile["COLUMNS"])),
        q, k, positions, begins, firsts, scores, R, J, stride,
        flops=2 * M * rows * J * width * P, WIDTH=width, **tile,
    )  # fmt: skip
    return scores


def _tile(q: Tensor, k: Tensor) -> dict:
    """Compile-time constants of the kernel."""
    P = q.shape[2]
    padded = max(16, triton.next_power_of_2(P))
    dot, part = operands(q, k, k)
    rows, ranges, warps = TILES[dot == tl.float32, padded > 64]
    rows = min(rows, max(16, triton.next_power_of_2(q.shape[1])))
    if not compiled():
        ranges = 64
    sizes = {"P": P, "PP": padded, "ROWS": rows, "COLUMNS": ranges, "num_warps": warps}
    return {**sizes, "DOT": dot, "PART": part}
