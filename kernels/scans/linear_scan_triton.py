"""The linear scan as Triton kernels (Martin and Cundy 2018, section 2).

A program handles some channels of one row, and goes over its tokens tile by tile with an
associative scan inside each tile. Sums have a fixed order, and there are no atomics. A tile holds
four numbers per thread; narrow tiles give enough programs at small batch sizes. Not yet run on a
GPU: tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import launch, or_other

TILE, WARPS = 512, 4
"""Elements of a tile: 4 per thread of 4 warps."""
CHANNELS = (32, 16, 8)
"""Widths of a tile, the widest first; 8 floats are one 32-byte memory sector."""
PROGRAMS = 512
"""Narrower tiles are used below this number of programs, about four per multiprocessor."""


@triton.jit
def _chain(log, value, next_log, next_value):
    """Compose two affine maps (log decay, value); a log of infinity marks a document's begin.

    It selects instead of multiplying by zero, because 0 * NaN is NaN: a NaN of another document
    must not pass.
    """
    forgets = next_log == float("inf")
    # Infinity stays: added to the log of a decay of zero it would be NaN.
    before = tl.where(log == float("inf"), log, log + next_log)
    decay = tl.exp(tl.where(forgets, 0.0, next_log))
    chained = tl.where(forgets, next_value, decay * value + next_value)
    return tl.where(forgets, next_log, before), chained


@triton.jit
def begins_document(documents, tokens, inside):  # noqa: ANN201
    """Mark tokens of another document than the one before; document 0 precedes token 0."""
    own = tl.load(documents + tokens, mask=inside, other=0)
    before = tl.load(documents + tokens - 1, mask=inside & (tokens > 0), other=0)
    return own != before


@triton.jit
def _scanned(log, value, carry):
    """The states of a tile, from the state before its first token."""
    # The scan starts from zero; the state before the tile is added to tokens up to the first reset.
    log, value = tl.associative_scan((log, value), 0, _chain)
    forgets = log == float("inf")
    decay = tl.exp(tl.where(forgets, 0.0, log))
    return tl.where(forgets, value, decay * carry[None, :] + value)


@triton.jit
def _last_row(x, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    return tl.sum(tl.where(rows == ROWS - 1, x, 0.0), axis=0)


@triton.jit
def _forward_kernel(
    log_decay, values, initial, documents, outputs, L, E,
    INITIAL: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = channels < E
    rows = tl.arange(0, ROWS)
    # A 64-bit offset for the tile and 32-bit offsets within it, which takes half the registers.
    within = rows[:, None] * E + channels[None, :]
    carry = tl.zeros((COLUMNS,), tl.float32)
    if INITIAL:
        carry = tl.load(initial + row * E + channels, mask=real, other=0.0)
    for start in range(0, L, ROWS):
        tokens = start + rows
        inside = tokens < L
        place = (row * L + start) * E
        mask = inside[:, None] & real[None, :]
        # Rows past the end have a decay of 1 and add 0: the last row is the state to carry on.
        log = tl.load(log_decay + place + within, mask=mask, other=0.0)
        value = tl.load(values + place + within, mask=mask, other=0.0).to(tl.float32)
        if PACKED:
            begins = begins_document(documents + row * L, tokens, inside)
            log = tl.where(begins[:, None], float("inf"), log)
        state = _scanned(log, value, carry)
        tl.store(outputs + place + within, state, mask=mask)
        carry = _last_row(state, ROWS)


@triton.jit
def _backward_kernel(
    d_outputs, log_decay, outputs, initial, documents, d_log_decay, d_values, d_initial, L, E,
    INITIAL: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scan the adjoint from the last token to the first: g[t] = dy[t] + decay[t + 1] g[t + 1].

    Tiles are loaded in reversed order. Decays are read one token late, as the decay of t + 1 enters
    the adjoint of t; nothing passes back across the begin of a document.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = channels < E
    rows = tl.arange(0, ROWS)
    within = channels[None, :] - rows[:, None] * E
    carry = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, L, ROWS):
        tokens = L - 1 - start - rows
        inside = tokens >= 0
        place = (row * L + L - 1 - start) * E
        mask = inside[:, None] & real[None, :]
        later = mask & (tokens < L - 1)[:, None]
        log = tl.load(log_decay + place + E + within, mask=later, other=0.0)
        given = tl.load(d_outputs + place + within, mask=mask, other=0.0).to(tl.float32)
        if PACKED:
            after = begins_document(documents + row * L, tokens + 1, inside & (tokens < L - 1))
            log = tl.where(after[:, None], float("inf"), log)
        adjoint = _scanned(log, given, carry)
        carry = _last_row(adjoint, ROWS)
        tl.store(d_values + place + within, adjoint, mask=mask)
        before = tl.load(
            outputs + place - E + within, mask=mask & (tokens > 0)[:, None], other=0.0
        ).to(tl.float32)
        if INITIAL:
            first = tl.load(initial + row * E + channels, mask=real, other=0.0)
            before = tl.where((tokens == 0)[:, None], first[None, :], before)
        # d_log_decay = g[t] * decay[t] * h[t - 1]; the outputs are the states h.
        decayed = adjoint * tl.exp(tl.load(log_decay + place + within, mask=mask, other=0.0))
        if PACKED:
            begins = begins_document(documents + row * L, tokens, inside)
            decayed = tl.where(begins[:, None], 0.0, decayed)
            before = tl.where(begins[:, None], 0.0, before)
        tl.store(d_log_decay + place + within, decayed * before, mask=mask)
        if INITIAL:
            # The gradient of the initial state is decay * adjoint of the first token.
            handed = tl.sum(tl.where((tokens == 0)[:, None], decayed, 0.0), axis=0)
            tl.store(d_initial + row * E + channels, handed, mask=real & (start + ROWS >= L))


def forward(
    log_decay: Tensor, values: Tensor, initial: Tensor | None, documents: Tensor | None
) -> Tensor:
    """Start the forward kernel; arguments and results are those of the operator."""
    batch, L, E = values.shape
    outputs = torch.empty_like(log_decay)
    columns = _columns(batch, E)
    launch(
        _forward_kernel,
        (batch, triton.cdiv(E, columns)),
        log_decay, values, or_other(initial, values), or_other(documents, values), outputs, L, E,
        num_warps=WARPS, flops=3 * values.numel(), INITIAL=initial is not None,
        PACKED=documents is not None, ROWS=_rows(L, columns), COLUMNS=columns,
    )  # fmt: skip
    return outputs


def backward(
    d_outputs: Tensor,
    log_decay: Tensor,
    outputs: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start the backward kernel; arguments and results are those of the operator."""
    batch, L, E = outputs.shape
    columns = _columns(batch, E)
    d_log_decay, d_values = torch.empty_like(outputs), torch.empty_like(outputs)
    d_initial = outputs.new_empty(0 if initial is None else batch, E)
    launch(
        _backward_kernel,
        (batch, triton.cdiv(E, columns)),
        d_outputs, log_decay, outputs, or_other(initial, outputs), or_other(documents, outputs),
        d_log_decay, d_values, d_initial, L, E,
        num_warps=WARPS, flops=6 * outputs.numel(), INITIAL=initial is not None,
        PACKED=documents is not None, ROWS=_rows(L, columns), COLUMNS=columns,
    )  # fmt: skip
    return d_log_decay, d_values, d_initial


def _columns(batch: int, E: int) -> int:
    """The widest tile that still leaves enough programs."""
    wide = (c for c in CHANNELS if batch * triton.cdiv(E, c) >= PROGRAMS)
    return min(next(wide, CHANNELS[-1]), triton.next_power_of_2(E))


def _rows(L: int, columns: int) -> int:
    return min(TILE // max(columns, CHANNELS[-1]), triton.next_power_of_2(L))
