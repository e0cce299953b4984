"""SSD as Triton kernels (Dao and Gu 2024, section 6).

Three kernels: decays inside each chunk; states, where a program goes over the chunks with one tile
of one head's state (also used for the adjoint, from the last chunk to the first); and outputs, one
program per chunk. There are no atomics.

Sums, decays and states are float32. Log decays inside a chunk are summed in float64 and stored as
two floats, so that differences keep all digits. Operands of products are bfloat16 if activations
are; a state is rounded when it is read, but not when it is carried on. Not yet run on a GPU: tested
in Triton's interpreter, compiled ahead of time.

Tokens after a non-finite input and tokens beyond the end have the document id EXCLUDED. They are
never loaded, so a NaN in them enters no product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scans.not_finite import NON_FINITE
from kernels.scans.ssd import CHUNK
from kernels.triton_launch import interpreting, launch


class Tiles(NamedTuple):
    """Tile sizes of a kernel, and warps per program."""

    channels: int
    entries: int
    warps: int


# From the ahead-of-time report at P 64 and N 128: no spills on sm_80, sm_90 and sm_100. The walk
# has small tiles because it has only one program per tile of a head's state. Float32 products do
# not use tensor cores and hold their operands in registers.
_TILES = {
    ("walk", tl.bfloat16): Tiles(32, 32, 4),
    ("outputs", tl.bfloat16): Tiles(64, 32, 8),
    ("head", tl.bfloat16): Tiles(32, 32, 8),
    ("shared", tl.bfloat16): Tiles(32, 32, 8),
    ("walk", tl.float32): Tiles(32, 32, 8),
    ("outputs", tl.float32): Tiles(32, 32, 8),
    ("head", tl.float32): Tiles(32, 16, 8),
    ("shared", tl.float32): Tiles(32, 32, 8),
}

EXCLUDED = tl.constexpr(NON_FINITE)

# Rows of `decays`: the log of the decay from the chunk's start as two floats; the decay from the
# state before the chunk, and to the state after it, zero in other documents; the step size.
ROWS = tl.constexpr(5)
HIGH, LOW, ENTERING, LEAVING, STEP = (tl.constexpr(row) for row in range(5))


@triton.jit
def documents_of(documents, tokens, L, PACKED: tl.constexpr) -> tl.tensor:
    """Load the tokens' documents; tokens beyond the end are excluded."""
    if PACKED:
        return tl.load(documents + tokens, mask=tokens < L, other=EXCLUDED)
    return tl.where(tokens < L, 0, EXCLUDED)


@triton.jit
def factors(decays, tokens, L, ROW: tl.constexpr) -> tl.tensor:
    """Load a row of the decays of one head; zero beyond the end."""
    return tl.load(decays + ROW * L + tokens, mask=tokens < L, other=0.0)


@triton.jit
def seen(ids) -> tl.tensor:
    """Mark the pairs (later token, earlier token) of one document."""
    index = tl.arange(0, ids.shape[0])
    return (index[:, None] >= index[None, :]) & (ids[:, None] == ids[None, :])


@triton.jit
def pair_decays(decays, tokens, L) -> tl.tensor:
    """The decay from each token (second axis) to each later one (first axis).

    For other pairs the exponent may be positive; it is clamped at 0, so that nothing overflows.
    """
    high, low = factors(decays, tokens, L, HIGH), factors(decays, tokens, L, LOW)
    exponents = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.minimum(exponents, 0.0))


@triton.jit
def load_tile(x, rows, columns, stride, real_rows, real_columns) -> tl.tensor:
    """Load x[rows, columns] in float32, zero outside the tensor.

    `x` points to the tile's corner, so that 32-bit offsets suffice, which saves registers.
    """
    offsets = rows[:, None] * stride + columns[None, :]
    mask = real_rows[:, None] & real_columns[None, :]
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, rows, columns, stride, real_rows, real_columns, tile) -> None:
    """Store to x[rows, columns] inside the tensor, in the dtype of x."""
    offsets = rows[:, None] * stride + columns[None, :]
    mask = real_rows[:, None] & real_columns[None, :]
    tl.store(x + offsets, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _decay_kernel(
    dt, A, documents, decays, L, H, K,
    PACKED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    head, chunk, row = program % H, program // H % K, program // H // K
    begin, end = chunk * TOKENS, tl.minimum(chunk * TOKENS + TOKENS, L)
    tokens = begin + tl.arange(0, TOKENS)
    ids = documents_of(documents + row * L, tokens, L, PACKED)
    valid = ids != EXCLUDED
    step = tl.load(dt + (row * L + tokens) * H + head, mask=valid, other=0.0)
    exponents = step.to(tl.float64) * tl.load(A + head).to(tl.float64)
    # A masked sum over all pairs instead of a cumulative sum: other documents contribute nothing,
    # not even rounding.
    exact = tl.sum(tl.where(seen(ids), exponents[None, :], 0.0), axis=1)
    # The exponent at the chunk's last token; the decay to the chunk's end is exp(total - exact).
    total = tl.sum(tl.where(tokens == end - 1, exact, 0.0), axis=0)
    enters, leaves = valid, valid
    if PACKED:
        before = tl.load(documents + row * L + begin - 1, mask=begin > 0, other=0)
        enters = valid & (ids == before)
        leaves = valid & (ids == tl.load(documents + row * L + end - 1))
    high = exact.to(tl.float32)
    inside = tokens < L
    to = decays + (row * H + head) * ROWS * L + tokens
    tl.store(to + HIGH * L, high, mask=inside)
    tl.store(to + LOW * L, (exact - high.to(tl.float64)).to(tl.float32), mask=inside)
    tl.store(to + ENTERING * L, tl.where(enters, tl.exp(high), 0.0), mask=inside)
    leaving = tl.exp(tl.minimum(total - exact, 0.0).to(tl.float32))
    tl.store(to + LEAVING * L, tl.where(leaves, leaving, 0.0), mask=inside)
    tl.store(to + STEP * L, step, mask=inside)


@triton.jit
def _state_kernel(
    inputs, shared, decays, start, states, end, L, H, G, P, N, K,
    START: tl.constexpr, ADJOINT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one head's state, chunk by chunk.

    The state adds each chunk's values times B; `states` gets the state before each chunk. The
    adjoint runs from the last chunk to the first and adds output gradients times C; `states` then
    gets the adjoint after each chunk.
    """
    program = tl.program_id(0).to(tl.int64)
    head, row = program % H, program // H
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    entries = tl.program_id(2) * ENTRIES + tl.arange(0, ENTRIES)
    real_channels, real_entries = channels < P, entries < N
    decays += program * ROWS * L
    index = tl.arange(0, TOKENS)
    state = tl.zeros((CHANNELS, ENTRIES), tl.float32)
    if START:
        # Not loaded if the first token belongs to another document: it may hold a NaN.
        wanted = P
        if not ADJOINT:
            wanted = tl.where(tl.load(decays + ENTERING * L) != 0, P, 0)
        start += program * P * N
        state = load_tile(start, channels, entries, N, channels < wanted, real_entries)
    for k in range(K):
        chunk = K - 1 - k if ADJOINT else k
        to = states + ((row * K + chunk) * H + head) * P * N
        store_tile(to, channels, entries, N, real_channels, real_entries, state)
        tokens = chunk * TOKENS + index
        first = row * L + chunk * TOKENS
        if ADJOINT:
            share = factors(decays, tokens, L, ENTERING)
        else:
            share = factors(decays, tokens, L, LEAVING) * factors(decays, tokens, L, STEP)
        at = inputs + (first * H + head) * P
        x = load_tile(at, index, channels, H * P, share != 0, real_channels)
        at = shared + (first * G + head // (H // G)) * N
        y = load_tile(at, index, entries, G * N, share != 0, real_entries)
        # The decay across the whole chunk; 0 if a document begins in it.
        kept = tl.load(decays + ENTERING * L + tl.minimum(chunk * TOKENS + TOKENS, L) - 1)
        x = tl.trans(x * share[:, None]).to(COMPUTE)
        added = tl.dot(x, y.to(COMPUTE), input_precision=PRECISION)
        # A selection: after a reset a NaN of the previous document must not survive as 0 * NaN.
        state = tl.where(kept != 0, kept * state, 0.0) + added
    to = end + program * P * N
    store_tile(to, channels, entries, N, real_channels, real_entries, state)


@triton.jit
def _output_kernel(
    values, decays, B, C, documents, states, outputs, L, H, G, P, N, K,
    PACKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of some channels of one head."""
    program = tl.program_id(0).to(tl.int64)
    head, chunk, row = program % H, program // H % K, program // H // K
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.arange(0, TOKENS)
    tokens, first = chunk * TOKENS + index, row * L + chunk * TOKENS
    ids = documents_of(documents + row * L, tokens, L, PACKED)
    valid, real = ids != EXCLUDED, channels < P
    decays += (row * H + head) * ROWS * L
    at = (first * G + head // (H // G)) * N
    states += program * P * N
    # Two parts (Dao and Gu 2024, section 6): the chunk's own tokens through the masked matrix of
    # decays times C B^T, and earlier ones through the state before the chunk.
    pairs = tl.zeros((TOKENS, TOKENS), tl.float32)
    carried = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for n in range(0, N, ENTRIES):
        entries = n + tl.arange(0, ENTRIES)
        b = load_tile(B + at, index, entries, G * N, valid, entries < N).to(COMPUTE)
        c = load_tile(C + at, index, entries, G * N, valid, entries < N).to(COMPUTE)
        state = load_tile(states, channels, entries, N, real, entries < N).to(COMPUTE)
        pairs += tl.dot(c, tl.trans(b), input_precision=PRECISION)
        carried += tl.dot(c, tl.trans(state), input_precision=PRECISION)
    entering, step = factors(decays, tokens, L, ENTERING), factors(decays, tokens, L, STEP)
    matrix = tl.where(seen(ids), pair_decays(decays, tokens, L) * pairs * step[None, :], 0.0)
    at = (first * H + head) * P
    x = load_tile(values + at, index, channels, H * P, valid, real).to(COMPUTE)
    y = tl.dot(matrix.to(COMPUTE), x, input_precision=PRECISION)
    # Likewise for tokens of other documents than the state's.
    y += tl.where((entering != 0)[:, None], entering[:, None] * carried, 0.0)
    # Tokens after a non-finite input, which were not loaded.
    y = tl.where(valid[:, None], y, float("nan"))
    store_tile(outputs + at, index, channels, H * P, tokens < L, real, y)


class Sizes(NamedTuple):
    """The sizes of one call: rows, length, heads, groups, channels, state entries, chunks."""

    batch: int
    L: int
    H: int
    G: int
    P: int
    N: int
    K: int

    @classmethod
    def of(cls, values: Tensor, B: Tensor) -> "Sizes":
        """Read them off the values and one of the factors that heads share."""
        batch, L, H, P = values.shape
        G, N = B.shape[2:]
        return cls(batch, L, H, G, P, N, triton.cdiv(L, CHUNK))


def plan(kernel: str, values: Tensor, N: int) -> dict[str, object]:
    """Launch options of a kernel. Tile sides are at least 16, the minimum of tensor cores.

    The interpreter does not multiply bfloat16 correctly, so it computes in float32.
    """
    half = values.dtype is torch.bfloat16 and not interpreting()
    compute = tl.bfloat16 if half else tl.float32
    tiles = _TILES[kernel, compute]
    return {
        "num_warps": tiles.warps,
        "CHANNELS": min(tiles.channels, max(16, triton.next_power_of_2(values.shape[3]))),
        "ENTRIES": min(tiles.entries, max(16, triton.next_power_of_2(N))),
        "TOKENS": CHUNK,
        "COMPUTE": compute,
        "PRECISION": "ieee",
    }


def chunk_decays(
    values: Tensor, dt: Tensor, A: Tensor, B: Tensor, documents: Tensor | None
) -> Tensor:
    """Start the kernel of decays; returns (B, H, ROWS, L)."""
    size = Sizes.of(values, B)
    decays = dt.new_empty(size.batch, size.H, ROWS.value, size.L)
    # The float64 sums take 80 to 96 registers with 4 warps, 48 with 8: occupancy 0.31 against 0.62.
    launch(
        _decay_kernel, (size.batch * size.K * size.H,),
        dt, A, either(documents, dt), decays, size.L, size.H, size.K,
        num_warps=8, PACKED=documents is not None, TOKENS=CHUNK,
    )  # fmt: skip
    return decays


def walk(
    inputs: Tensor, shared: Tensor, decays: Tensor, start: Tensor | None, adjoint: bool
) -> tuple[Tensor, Tensor]:
    """Start the state kernel; returns the states between chunks, and the one after the last step.

    Args:
        inputs: values, or gradients of the outputs.
        shared: B, or C.
        decays: of `chunk_decays`.
        start: the initial state, or the gradient of the final one.
        adjoint: from the last chunk to the first.
    """
    size = Sizes.of(inputs, shared)
    batch, _, H, _, P, N, K = size
    states, end = decays.new_empty(batch, K, H, P, N), decays.new_empty(batch, H, P, N)
    how = plan("walk", inputs, N)
    launch(
        _state_kernel,
        (batch * H, triton.cdiv(P, how["CHANNELS"]), triton.cdiv(N, how["ENTRIES"])),
        inputs, shared, decays, either(start, end), states, end, *size[1:],
        flops=2 * batch * size.L * H * P * N, START=start is not None, ADJOINT=adjoint, **how,
    )  # fmt: skip
    return states, end


def forward(
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
    D: None = None,
) -> tuple[Tensor, Tensor]:
    """Start the forward kernels; arguments and results are those of the operator, without D."""
    assert D is None, "the caller adds it"
    size = Sizes.of(values, B)
    decays = chunk_decays(values, dt, A, B, documents)
    states, final = walk(values, B, decays, initial, adjoint=False)
    outputs, how = torch.empty_like(values), plan("outputs", values, size.N)
    launch(
        _output_kernel,
        (size.batch * size.K * size.H, triton.cdiv(size.P, how["CHANNELS"])),
        values, decays, B, C, either(documents, values), states, outputs, *size[1:],
        flops=2 * values.numel() // size.P * (CHUNK * (size.N + size.P) + size.P * size.N),
        PACKED=documents is not None, **how,
    )  # fmt: skip
    return outputs, final


def either(given: Tensor | None, instead: Tensor) -> Tensor:
    """The tensor or, if it is None, a placeholder that the kernel does not read."""
    return instead if given is None else given
