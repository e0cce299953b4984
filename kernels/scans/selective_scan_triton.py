"""The selective scan as Triton kernels, parallel over chunks (Gu and Dao 2023, section 3.3).

Forward and backward take three steps: the contribution of each chunk to the state
(`_summary_kernel`), the states between chunks (`_carry_kernel`), and all chunks in parallel from
these states. That takes one exponential more per element than a sequential scan, and fills the GPU
at any batch size. Only the states between chunks are kept for the backward pass. Sums over channels
and chunks are written as partial sums and added by torch, in a fixed order. Not yet run on a GPU:
tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scans.linear_scan_triton import begins_document
from kernels.triton_launch import launch, or_other

CHUNK = 32
"""Tokens per chunk when no states are kept."""
CHANNELS, WARPS = 32, 8
"""Width and warps of a chunk's tile: four elements per thread."""
BACKWARD_WARPS = 16
"""Two elements per thread: with four, the backward kernel spills on two of three chips."""
COLUMNS = 8
"""Channels per program of the output kernel: one warp holds all their states in registers."""
ENTRIES = 256
"""State entries per program of the carry kernel."""


@triton.jit
def _chain(decay, value, next_decay, next_value):
    """Compose two affine maps (decay, value); a negative decay marks a document's begin.

    It selects instead of multiplying by zero, because 0 * NaN is NaN: a NaN of another document
    must not pass.
    """
    forgets = next_decay < 0
    chained = tl.where(forgets, next_value, next_decay * value + next_value)
    return tl.where(forgets | (decay < 0), -1.0, decay * next_decay), chained


@triton.jit
def _after(decay, value, carry):
    """Apply scanned affine maps to the state before them."""
    return tl.where(decay < 0, value, decay * carry[None, :] + value)


@triton.jit
def _tile(x, rows, inside, channels, real, E):
    # A 64-bit offset for the tile and 32-bit offsets within it, which takes half the registers.
    within = rows[:, None] * E + channels[None, :]
    return tl.load(x + within, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _summary_kernel(
    values, dt, A, factors, documents, summaries, totals, L, E, N,
    ADJOINT: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each chunk's state from zero (or, adjoint, the gradient at its start), and dt's sum.

    Exponents are sums of the steps after a token (before it, for the adjoint), accumulated
    directly: differences of prefix sums would lose small ones. An infinite sum marks that a
    document begins in the chunk.
    """
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real = channels < E
    rows = tl.arange(0, ROWS)
    tokens = (chunk * ROWS).to(tl.int32) + rows
    first = row * L + chunk * ROWS
    inside = tokens < L
    kept = inside
    begins = 0
    if PACKED:
        starts = begins_document(documents + row * L, tokens, inside).to(tl.int32)
        begins = tl.sum(starts)
        passed = tl.cumsum(starts)
        # A state at the chunk's end comes from the tokens after its last reset; an adjoint at its
        # start, from those before its first.
        kept = inside & (passed == (0 if ADJOINT else begins))
    step = _tile(dt + first * E, rows, kept, channels, real, E)
    given = _tile(values + first * E, rows, kept, channels, real, E)
    if ADJOINT:
        # With the own step: the output of token t reads the state after its decay.
        exponent = tl.cumsum(step, 0)
    else:
        given *= step
        later = kept & (rows + 1 < ROWS) & (tokens + 1 < L)
        step_after = _tile(dt + (first + 1) * E, rows, later, channels, real, E)
        # The steps after each token, without its own: reading one token late excludes it.
        exponent = tl.cumsum(step_after, 0, reverse=True)
    border = row * tl.num_programs(0) + chunk
    # Infinity marks a reset. The carry kernel tests for it: rate 0 times infinity is NaN.
    total = tl.where(begins > 0, float("inf"), tl.sum(step, axis=0))
    tl.store(totals + border * E + channels, total, mask=real)
    for n in range(N):
        rate = tl.load(A + channels * N + n, mask=real, other=0.0)
        factor = tl.load(factors + (first * N + n) + rows * N, mask=kept, other=0.0).to(tl.float32)
        added = tl.exp(exponent * rate[None, :]) * given * factor[:, None]
        added = tl.sum(tl.where(kept[:, None], added, 0.0), axis=0)
        tl.store(summaries + (border * N + n) * E + channels, added, mask=real)


@triton.jit
def _carry_kernel(
    summaries, totals, A, first, last, chunks, E, N,
    FIRST: tl.constexpr, ADJOINT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Replace each chunk's summary by the state before it (or the adjoint after it), in place."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    real = entries < N * E
    channels = entries % E
    # Borders are stored as (N, E), initial and final states as (E, N).
    outside = row * N * E + channels * N + entries // E
    rate = tl.load(A + channels * N + entries // E, mask=real, other=0.0)
    state = tl.zeros((SIZE,), tl.float32)
    if FIRST:
        state = tl.load(first + outside, mask=real, other=0.0)
    for i in range(chunks):
        border = row * chunks + (chunks - 1 - i if ADJOINT else i)
        place = summaries + border * N * E + entries
        added = tl.load(place, mask=real, other=0.0)
        total = tl.load(totals + border * E + channels, mask=real, other=0.0)
        tl.store(place, state, mask=real)
        forgets = total == float("inf")
        decay = tl.exp(rate * tl.where(forgets, 0.0, total))
        state = tl.where(forgets, added, decay * state + added)
    tl.store(last + outside, state, mask=real)


@triton.jit
def _output_kernel(
    values, dt, A, B, C, documents, borders, outputs, L, E, N,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Run over a chunk's tokens sequentially, with all states of some channels in registers."""
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.arange(0, STATES)
    real, used = channels < E, n < N
    mask = used[:, None] & real[None, :]
    rate = tl.load(A + channels[None, :] * N + n[:, None], mask=mask, other=0.0)
    border = (row * tl.num_programs(0) + chunk) * N
    state = tl.load(borders + (border + n[:, None]) * E + channels[None, :], mask=mask, other=0.0)
    for token in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, L)):
        place = row * L + token
        step = tl.load(dt + place * E + channels, mask=real, other=0.0).to(tl.float32)
        value = tl.load(values + place * E + channels, mask=real, other=0.0).to(tl.float32)
        b = tl.load(B + place * N + n, mask=used, other=0.0).to(tl.float32)
        c = tl.load(C + place * N + n, mask=used, other=0.0).to(tl.float32)
        if PACKED:
            own = tl.load(documents + place)
            before = tl.load(documents + place - 1, mask=token > 0, other=0)
            state = tl.where(own == before, state, 0.0)
        state = tl.exp(step[None, :] * rate) * state + (step * value)[None, :] * b[:, None]
        tl.store(outputs + place * E + channels, tl.sum(state * c[:, None], axis=0), mask=real)


@triton.jit
def _backward_kernel(
    d_outputs, values, dt, A, B, C, documents, borders, adjoints,
    d_values, d_dt, part_A, part_B, part_C, L, E, N,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scan a chunk's states and adjoints, one state entry at a time.

    Both scans are shifted by one token, to give decay * (state before the token) directly:
    computing it as the state minus the token's input would cancel.
    """
    chunk, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channels = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    real = channels < E
    rows = tl.arange(0, ROWS)
    tokens = (chunk * ROWS).to(tl.int32) + rows
    inside = tokens < L
    earlier, later = inside & (rows > 0), (tokens + 1 < L) & (rows + 1 < ROWS)
    first = row * L + chunk * ROWS
    step = _tile(dt + first * E, rows, inside, channels, real, E)
    step_before = _tile(dt + (first - 1) * E, rows, earlier, channels, real, E)
    step_after = _tile(dt + (first + 1) * E, rows, later, channels, real, E)
    given = step * _tile(values + first * E, rows, inside, channels, real, E)
    given_before = step_before * _tile(values + (first - 1) * E, rows, earlier, channels, real, E)
    d_output = _tile(d_outputs + first * E, rows, inside, channels, real, E)
    if PACKED:
        begins = begins_document(documents + row * L, tokens, inside)[:, None]
        begins_before = begins_document(documents + row * L, tokens - 1, earlier)[:, None]
        begins_after = begins_document(documents + row * L, tokens + 1, later)[:, None]
    border = (row * tl.num_programs(0) + chunk) * N
    along = (tl.program_id(2) * tl.num_programs(1) + row) * N * L + chunk * ROWS
    by_input = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_step = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(N):
        rate = tl.load(A + n + channels * N, mask=real, other=0.0)[None, :]
        place = first * N + n
        b = tl.load(B + place + rows * N, mask=inside, other=0.0).to(tl.float32)[:, None]
        c = tl.load(C + place + rows * N, mask=inside, other=0.0).to(tl.float32)[:, None]
        b_before = tl.load(B + (place - N) + rows * N, mask=earlier, other=0.0).to(tl.float32)
        decay_before = tl.exp(step_before * rate)
        if PACKED:
            decay_before = tl.where(begins_before, -1.0, decay_before)
        start = tl.load(borders + (border + n) * E + channels, mask=real, other=0.0)
        scanned = tl.associative_scan((decay_before, given_before * b_before[:, None]), 0, _chain)
        decayed = tl.exp(step * rate) * _after(scanned[0], scanned[1], start)
        if PACKED:
            decayed = tl.where(begins, 0.0, decayed)
        # decayed + given * b is the state h[t].
        d_c = tl.sum(d_output * (decayed + given * b), axis=1)
        tl.store(part_C + (along + n * L) + rows, d_c, mask=inside)
        decay_after = tl.exp(step_after * rate)
        if PACKED:
            decay_after = tl.where(begins_after, -1.0, decay_after)
        end = tl.load(adjoints + (border + n) * E + channels, mask=real, other=0.0)
        scanned = tl.associative_scan((decay_after, c * d_output), 0, _chain, reverse=True)
        adjoint = _after(scanned[0], scanned[1], end)
        tl.store(part_B + (along + n * L) + rows, tl.sum(adjoint * given, axis=1), mask=inside)
        by_input += adjoint * b
        # The exponent dt A has the gradient g[t] * decay * h[t - 1], shared by dt and A.
        by_exponent = adjoint * decayed
        by_step += by_exponent * rate
        # Rows past the end hold the adjoint at the end, and add nothing: their step is 0.
        tl.store(
            part_A + (border + n) * E + channels, tl.sum(by_exponent * step, axis=0), mask=real
        )
    mask = inside[:, None] & real[None, :]
    within = rows[:, None] * E + channels[None, :]
    value = _tile(values + first * E, rows, inside, channels, real, E)
    tl.store(d_values + first * E + within, step * by_input, mask=mask)
    tl.store(d_dt + first * E + within, value * by_input + by_step, mask=mask)


def forward(
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
    chunk: int,
    D: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start the forward kernels; arguments and results are those of the operator, without D.

    A chunk, the tokens between kept states, is a power of two; 0 keeps none.
    """
    assert D is None, "the caller adds it"
    batch, L, E = values.shape
    N, rows = A.shape[1], chunk or CHUNK
    borders, final = _bordering(values, dt, A, B, documents, initial, rows, adjoint=False)
    outputs = torch.empty_like(values)
    columns = min(COLUMNS, triton.next_power_of_2(E))
    launch(
        _output_kernel,
        (triton.cdiv(L, rows), batch, triton.cdiv(E, columns)),
        values, dt, A, B, C, or_other(documents, values), borders, outputs, L, E, N,
        num_warps=1, flops=7 * values.numel() * N, PACKED=documents is not None, ROWS=rows,
        COLUMNS=columns, STATES=triton.next_power_of_2(N),
    )  # fmt: skip
    return outputs, final, borders if chunk else borders.new_empty(batch, 0, N, E)


def backward(
    d_outputs: Tensor,
    d_final: Tensor | None,
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    checkpoints: Tensor,
    chunk: int,
    D: None = None,
) -> tuple[Tensor, ...]:
    """Start the backward kernels; arguments and results are those of the operator, without D."""
    assert D is None, "the caller adds it"
    batch, L, E = values.shape
    N, columns = A.shape[1], min(CHANNELS, triton.next_power_of_2(E))
    adjoints, d_initial = _bordering(d_outputs, dt, A, C, documents, d_final, chunk, adjoint=True)
    d_values, d_dt = torch.empty_like(values), torch.empty_like(dt)
    part_A = torch.empty_like(checkpoints)
    programs = triton.cdiv(E, columns)
    part_B, part_C = (A.new_empty(programs, batch, N, L) for _ in range(2))
    launch(
        _backward_kernel,
        (triton.cdiv(L, chunk), batch, programs),
        d_outputs, values, dt, A, B, C, or_other(documents, values), checkpoints, adjoints,
        d_values, d_dt, part_A, part_B, part_C, L, E, N,
        num_warps=BACKWARD_WARPS, flops=25 * values.numel() * N, PACKED=documents is not None,
        ROWS=chunk, COLUMNS=columns,
    )  # fmt: skip
    # Sums over programs in a fixed order, so results are deterministic.
    d_A = part_A.flatten(0, 1).sum(0).t().contiguous()
    d_B, d_C = (part.sum(0).transpose(1, 2).to(B.dtype).contiguous() for part in (part_B, part_C))
    return d_values, d_dt, d_A, d_B, d_C, d_initial, A.new_empty(0)


def _bordering(
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    factors: Tensor,
    documents: Tensor | None,
    first: Tensor | None,
    rows: int,
    *,
    adjoint: bool,
) -> tuple[Tensor, Tensor]:
    """States (or adjoints) between chunks (B, chunks, N, E), and the one after the last chunk."""
    batch, L, E = values.shape
    N, chunks = A.shape[1], triton.cdiv(L, rows)
    columns = min(CHANNELS, triton.next_power_of_2(E))
    borders, totals = A.new_empty(batch, chunks, N, E), A.new_empty(batch, chunks, E)
    last = A.new_empty(batch, E, N)
    launch(
        _summary_kernel,
        (chunks, batch, triton.cdiv(E, columns)),
        values, dt, A, factors, or_other(documents, values), borders, totals, L, E, N,
        num_warps=WARPS, flops=5 * values.numel() * N, ADJOINT=adjoint,
        PACKED=documents is not None, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    size = min(ENTRIES, triton.next_power_of_2(N * E))
    launch(
        _carry_kernel,
        (batch, triton.cdiv(N * E, size)),
        borders, totals, A, or_other(first, A), last, chunks, E, N,
        num_warps=4, flops=4 * borders.numel(), FIRST=first is not None, ADJOINT=adjoint, SIZE=size,
    )  # fmt: skip
    return borders, last
