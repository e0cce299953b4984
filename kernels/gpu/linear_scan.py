"""The linear scan as Triton kernels: tiles of tokens, scanned inside, chained in order.

One program owns some channels of one row and walks over its tokens, so that sums are ordered and
nothing is atomic. Not run on a GPU so far: tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import launch

TOKENS, CHANNELS = 32, 64
WARPS = 4


@triton.jit
def _chain(decay, value, begins, next_decay, next_value, next_begins):
    """Compose two affine maps; a map that begins a document forgets what came before it.

    A selection, not a product with zero: NaN of another document must not come through.
    """
    goes_on = next_begins == 0
    chained_decay = tl.where(goes_on, decay * next_decay, next_decay)
    chained_value = tl.where(goes_on, next_decay * value + next_value, next_value)
    return chained_decay, chained_value, begins | next_begins


@triton.jit
def _begins(documents, tokens, inside):
    """Mark tokens of another document than the one before; document 0 precedes token 0."""
    own = tl.load(documents + tokens, mask=inside, other=0)
    before = tl.load(documents + tokens - 1, mask=inside & (tokens > 0), other=0)
    return (own != before).to(tl.int32)


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
    carry = tl.zeros((COLUMNS,), tl.float32)
    if INITIAL:
        carry = tl.load(initial + row * E + channels, mask=real, other=0.0)
    for start in range(0, L, ROWS):
        tokens = start + tl.arange(0, ROWS)
        inside = tokens < L
        offsets = (row * L + tokens[:, None]) * E + channels[None, :]
        mask = inside[:, None] & real[None, :]
        log = tl.load(log_decay + offsets, mask=mask, other=0.0)
        value = tl.load(values + offsets, mask=mask, other=0.0)
        begins = tl.zeros((ROWS, COLUMNS), tl.int32)
        if PACKED:
            begins = begins + _begins(documents + row * L, tokens, inside)[:, None]
        _, value, begins = tl.associative_scan((tl.exp(log), value, begins), 0, _chain)
        # The carry's decay is rounded once a tile, not once a token.
        carried = tl.exp(tl.cumsum(log, 0)) * carry[None, :]
        state = tl.where(begins == 0, carried + value, value)
        tl.store(outputs + offsets, state, mask=mask)
        carry = _last_row(state, ROWS)


@triton.jit
def _backward_kernel(
    d_outputs, log_decay, outputs, initial, documents, d_log_decay, d_values, d_initial, L, E,
    INITIAL: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scan the adjoint from the last token to the first; tiles are loaded in that order.

    The adjoint of a token is multiplied by the decay of the token after it, which is therefore read
    one token late; a token that begins a document hands nothing back.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = channels < E
    carry = tl.zeros((COLUMNS,), tl.float32)
    first = tl.zeros((COLUMNS,), tl.float32)
    if INITIAL:
        first = tl.load(initial + row * E + channels, mask=real, other=0.0)
    for start in range(0, L, ROWS):
        tokens = L - 1 - start - tl.arange(0, ROWS)
        inside = tokens >= 0
        offsets = (row * L + tokens[:, None]) * E + channels[None, :]
        mask = inside[:, None] & real[None, :]
        later = mask & (tokens < L - 1)[:, None]
        log_after = tl.load(log_decay + offsets + E, mask=later, other=0.0)
        given = tl.load(d_outputs + offsets, mask=mask, other=0.0)
        begins_after = tl.zeros((ROWS, COLUMNS), tl.int32)
        begins = tl.zeros((ROWS, COLUMNS), tl.int32)
        if PACKED:
            after = _begins(documents + row * L, tokens + 1, inside & (tokens < L - 1))
            begins_after = begins_after + after[:, None]
            begins = begins + _begins(documents + row * L, tokens, inside)[:, None]
        scanned = tl.associative_scan((tl.exp(log_after), given, begins_after), 0, _chain)
        carried = tl.exp(tl.cumsum(log_after, 0)) * carry[None, :]
        adjoint = tl.where(scanned[2] == 0, carried + scanned[1], scanned[1])
        carry = _last_row(adjoint, ROWS)
        before = tl.load(outputs + offsets - E, mask=mask & (tokens > 0)[:, None], other=0.0)
        before = tl.where((tokens == 0)[:, None], first[None, :], before)
        decayed = adjoint * tl.exp(tl.load(log_decay + offsets, mask=mask, other=0.0))
        goes_on = begins == 0
        tl.store(d_values + offsets, adjoint, mask=mask)
        tl.store(d_log_decay + offsets, tl.where(goes_on, decayed * before, 0.0), mask=mask)
        if INITIAL:
            at_first = (tokens == 0)[:, None] & goes_on
            handed = tl.sum(tl.where(at_first, decayed, 0.0), axis=0)
            tl.store(d_initial + row * E + channels, handed, mask=real & (start + ROWS >= L))


def forward(
    log_decay: Tensor, values: Tensor, initial: Tensor | None, documents: Tensor | None
) -> Tensor:
    """Start the forward kernel; arguments and results are those of the operator."""
    outputs = torch.empty_like(values)
    batch, L, E = values.shape
    columns = min(CHANNELS, triton.next_power_of_2(E))
    launch(
        _forward_kernel,
        (batch, triton.cdiv(E, columns)),
        log_decay, values, _or(initial, values), _or(documents, values), outputs, L, E,
        num_warps=WARPS, INITIAL=initial is not None, PACKED=documents is not None,
        ROWS=TOKENS, COLUMNS=columns,
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
    columns = min(CHANNELS, triton.next_power_of_2(E))
    d_log_decay, d_values = torch.empty_like(outputs), torch.empty_like(outputs)
    d_initial = outputs.new_empty(0 if initial is None else batch, E)
    launch(
        _backward_kernel,
        (batch, triton.cdiv(E, columns)),
        d_outputs, log_decay, outputs, _or(initial, outputs), _or(documents, outputs),
        d_log_decay, d_values, d_initial, L, E,
        num_warps=WARPS, INITIAL=initial is not None, PACKED=documents is not None,
        ROWS=TOKENS, COLUMNS=columns,
    )  # fmt: skip
    return d_log_decay, d_values, d_initial


def _or(given: Tensor | None, instead: Tensor) -> Tensor:
    """The tensor, or another in the place of one that the kernel will not touch."""
    return instead if given is None else given
