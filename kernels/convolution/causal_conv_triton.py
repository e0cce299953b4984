"""The causal depthwise convolution as Triton kernels (Gu and Dao 2023, section 3.4).

A program handles one tile of tokens and channels. Inputs and outputs have the dtype of the values;
sums are float32. The backward kernel visits each pair of an input and an output once, for all three
gradients. The gradients of weight and bias are summed within tiles, then over tiles by torch, in a
fixed order. Not yet run on a GPU: tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import launch, or_other

TOKENS, CHANNELS = 32, 32
WARPS = 8


@triton.jit
def _seen(documents, own, positions, inside):
    """Mark tokens of the document `own`; tokens before the first belong to document 0."""
    return tl.load(documents + positions, mask=inside & (positions >= 0), other=0) == own


@triton.jit
def _inputs(values, initial, positions, inside, channels, real, E, K, INITIAL: tl.constexpr):
    """Values, or carried inputs before the first token, or zeros."""
    given = inside & (positions >= 0)
    offsets = positions[:, None] * E + channels[None, :]
    x = tl.load(values + offsets, mask=given[:, None] & real[None, :], other=0.0).to(tl.float32)
    if INITIAL:
        carried = inside & (positions < 0)
        offsets = (positions + K - 1)[:, None] * E + channels[None, :]
        mask = carried[:, None] & real[None, :]
        x = tl.where(mask, tl.load(initial + offsets, mask=mask, other=0.0).to(tl.float32), x)
    return x


@triton.jit
def _forward_kernel(
    values, weight, bias, initial, documents, outputs, L, E,
    K: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = channels < E, tokens < L
    if PACKED:
        own = tl.load(documents + row * L + tokens, mask=inside, other=0)
    # K is a compile-time constant, so the loop over taps is unrolled.
    total = tl.zeros((ROWS, COLUMNS), tl.float32) + tl.load(bias + channels, mask=real, other=0.0)
    for k in tl.static_range(K):
        positions = tokens - (K - 1) + k
        x = _inputs(
            values + row * L * E, initial + row * (K - 1) * E,
            positions, inside, channels, real, E, K, INITIAL,
        )  # fmt: skip
        if PACKED:
            seen = _seen(documents + row * L, own, positions, inside)
            x = tl.where(seen[:, None], x, 0.0)
        total += tl.load(weight + channels * K + k, mask=real, other=0.0)[None, :] * x
    mask = inside[:, None] & real[None, :]
    tl.store(outputs + (row * L + tokens[:, None]) * E + channels[None, :], total, mask=mask)


@triton.jit
def _backward_kernel(
    d_outputs, values, weight, initial, documents, d_values, d_initial, partial, L, E,
    K: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gather the gradient of each input, carried ones included, from the K outputs that read it."""
    row = tl.program_id(1).to(tl.int64)
    # Tiles cover inputs: K - 1 carried ones at negative positions, then those of the tokens.
    first = -(K - 1) if INITIAL else 0
    positions = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS) + first
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = channels < E, positions < L
    x = _inputs(
        values + row * L * E, initial + row * (K - 1) * E,
        positions, inside, channels, real, E, K, INITIAL,
    )  # fmt: skip
    if PACKED:
        own = tl.load(documents + row * L + positions, mask=inside & (positions >= 0), other=0)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * (K + 1)
    owed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        tokens = positions + (K - 1) - k
        reached = inside & (tokens >= 0) & (tokens < L)
        if PACKED:
            reached = reached & _seen(documents + row * L, own, tokens, reached)
        offsets = (row * L + tokens[:, None]) * E + channels[None, :]
        given = tl.load(d_outputs + offsets, mask=reached[:, None] & real[None, :], other=0.0)
        given = given.to(tl.float32)
        owed += tl.load(weight + channels * K + k, mask=real, other=0.0)[None, :] * given
        products = tl.where(reached[:, None], given * x, 0.0)
        tl.store(partial + (part + k) * E + channels, tl.sum(products, axis=0), mask=real)
        # The last tap reads the own token, so these outputs are exactly those of the tile's tokens.
        if k == K - 1:
            tl.store(partial + (part + K) * E + channels, tl.sum(given, axis=0), mask=real)
    mask = (inside & (positions >= 0))[:, None] & real[None, :]
    tl.store(d_values + (row * L + positions[:, None]) * E + channels[None, :], owed, mask=mask)
    if INITIAL:
        mask = (positions < 0)[:, None] & real[None, :]
        places = (row * (K - 1) + positions + K - 1)[:, None] * E + channels[None, :]
        tl.store(d_initial + places, owed, mask=mask)


def forward(
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """Start the forward kernel; arguments and results are those of the operator."""
    batch, L, E = values.shape
    K = weight.shape[1]
    outputs = torch.empty_like(values)
    rows, columns = _tile(L, E)
    launch(
        _forward_kernel,
        (triton.cdiv(L, rows), batch, triton.cdiv(E, columns)),
        values, weight, bias, or_other(initial, values), or_other(documents, values), outputs, L, E,
        num_warps=WARPS, flops=2 * K * values.numel(), K=K, INITIAL=_carries(initial),
        PACKED=documents is not None, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return outputs


def backward(
    d_outputs: Tensor,
    values: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Start the backward kernel; arguments and results are those of the operator."""
    batch, L, E = values.shape
    K = weight.shape[1]
    carries = _carries(initial)
    rows, columns = _tile(L, E)
    tiles = triton.cdiv(L + (K - 1 if carries else 0), rows)
    d_values = torch.empty_like(values)
    d_initial = values.new_empty(0 if initial is None else batch, K - 1, E)
    partial = weight.new_empty(batch * tiles, K + 1, E)
    launch(
        _backward_kernel,
        (tiles, batch, triton.cdiv(E, columns)),
        d_outputs, values, weight, or_other(initial, values), or_other(documents, values),
        d_values, d_initial, partial, L, E,
        num_warps=WARPS, flops=4 * K * values.numel(), K=K, INITIAL=carries,
        PACKED=documents is not None, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    # Row k of `partial` is the gradient of tap k, row K that of the bias.
    sums = partial.sum(0)
    return d_values, sums[:K].t().contiguous(), sums[K].clone(), d_initial


def _carries(initial: Tensor | None) -> bool:
    """Whether there are carried inputs; with one tap there are none."""
    return initial is not None and initial.shape[1] > 0


def _tile(L: int, E: int) -> tuple[int, int]:
    return min(TOKENS, triton.next_power_of_2(L)), min(CHANNELS, triton.next_power_of_2(E))
