"""The gradients of SSD as Triton kernels (Dao and Gu 2024, section 6).

One kernel computes gradients per head (values, dt, A), another those that heads share (B, C). The
states before each chunk and their adjoints are recomputed by `walk` of `kernels.scans.ssd_triton`.
Gradients to which several programs contribute are written as partial sums and added in order. Not
yet run on a GPU: tested in Triton's interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scans.ssd import CHUNK
from kernels.scans.ssd_triton import (
    ENTERING,
    EXCLUDED,
    LEAVING,
    ROWS,
    STEP,
    Sizes,
    chunk_decays,
    documents_of,
    either,
    factors,
    load_tile,
    pair_decays,
    plan,
    seen,
    store_tile,
    walk,
)
from kernels.triton_launch import launch

# Most heads over which one program sums the gradients of B and C.
HEADS = 8


@triton.jit
def _head_kernel(
    d_outputs, values, decays, A, B, C, documents, states, d_states, d_values, d_dt, d_A,
    L, H, G, P, N, K,
    PACKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of some channels of one head; writes partial sums for dt and A."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, chunk, row = program % H, program // H % K, program // H // K
    batch = tl.num_programs(0) // H // K
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    index = tl.arange(0, TOKENS)
    tokens, first = chunk * TOKENS + index, row * L + chunk * TOKENS
    ids = documents_of(documents + row * L, tokens, L, PACKED)
    valid, real = ids != EXCLUDED, channels < P
    decays += (row * H + head) * ROWS * L
    at = (first * G + head // (H // G)) * N
    pairs = tl.zeros((TOKENS, TOKENS), tl.float32)
    carried = tl.zeros((TOKENS, CHANNELS), tl.float32)
    added = tl.zeros((TOKENS, CHANNELS), tl.float32)
    kept = tl.zeros((CHANNELS,), tl.float32)
    for n in range(0, N, ENTRIES):
        entries = n + tl.arange(0, ENTRIES)
        some = entries < N
        b = load_tile(B + at, index, entries, G * N, valid, some).to(COMPUTE)
        c = load_tile(C + at, index, entries, G * N, valid, some).to(COMPUTE)
        pairs += tl.dot(c, tl.trans(b), input_precision=PRECISION)
        before = load_tile(states + program * P * N, channels, entries, N, real, some)
        after = load_tile(d_states + program * P * N, channels, entries, N, real, some)
        kept += tl.sum(before * after, axis=1)
        carried += tl.dot(c, tl.trans(before.to(COMPUTE)), input_precision=PRECISION)
        added += tl.dot(b, tl.trans(after.to(COMPUTE)), input_precision=PRECISION)
    at = (first * H + head) * P
    x = load_tile(values + at, index, channels, H * P, valid, real)
    dy = load_tile(d_outputs + at, index, channels, H * P, valid, real)
    entering, leaving = factors(decays, tokens, L, ENTERING), factors(decays, tokens, L, LEAVING)
    step = factors(decays, tokens, L, STEP)
    # The matrix without step sizes: dt multiplies its columns.
    matrix = tl.where(seen(ids), pair_decays(decays, tokens, L) * pairs, 0.0)
    # The gradient of dt x: through the state after the chunk, and through the chunk's outputs.
    added = tl.where((leaving != 0)[:, None], leaving[:, None] * added, 0.0)
    received = tl.trans(matrix.to(COMPUTE))
    d_steps = added + tl.dot(received, dy.to(COMPUTE), input_precision=PRECISION)
    to = d_values + at
    store_tile(to, index, channels, H * P, tokens < L, real, step[:, None] * d_steps)
    # The gradient of each token's log decay sums everything that decays across it: pairs of an
    # earlier and a later token, the previous state's contribution to it and later tokens, earlier
    # tokens' contributions to the next state, and the state carried across the chunk. All terms are
    # added as they are; differences of running sums would cancel under strong decay.
    # Products of output gradients and values: the gradient of the matrix.
    scores = tl.dot(dy.to(COMPUTE), tl.trans(x.to(COMPUTE)), input_precision=PRECISION)
    # later[i, j] sums the pairs of token j with tokens i and after; those with j < i decay across
    # i.
    later = tl.cumsum(matrix * scores * step[None, :], axis=0, reverse=True)
    by_added = step * tl.sum(added * x, axis=1)
    by_carried = tl.sum(dy * carried, axis=1)
    by_carried = tl.where(entering != 0, entering * by_carried, 0.0)
    earlier = index[None, :] < index[:, None]
    d_log = tl.sum(tl.where(earlier, later + by_added[None, :], 0.0), axis=1)
    d_log += tl.sum(tl.where(earlier, 0.0, by_carried[None, :]), axis=1)
    last = tl.load(decays + ENTERING * L + tl.minimum(chunk * TOKENS + TOKENS, L) - 1)
    d_log += tl.where(last != 0, last * tl.sum(kept, axis=0), 0.0)
    # dt is a factor of the input and, times A, the log decay.
    d_step = tl.sum(d_steps * x, axis=1) + tl.load(A + head) * d_log
    to = d_dt + ((part * batch + row) * L + tokens) * H + head
    tl.store(to, tl.where(valid, d_step, 0.0), mask=tokens < L)
    tl.store(d_A + part * batch * K * H + program, tl.sum(step * d_log, axis=0))


@triton.jit
def _shared_kernel(
    d_outputs, values, decays, B, C, documents, states, d_states, d_B, d_C,
    L, H, G, P, N, K, EACH,
    PACKED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of some state entries, summed over EACH heads of a group."""
    program = tl.program_id(0).to(tl.int64)
    parts = H // EACH
    part, chunk, row = program % parts, program // parts % K, program // parts // K
    index = tl.arange(0, TOKENS)
    tokens, first = chunk * TOKENS + index, row * L + chunk * TOKENS
    ids = documents_of(documents + row * L, tokens, L, PACKED)
    valid, visible = ids != EXCLUDED, seen(ids)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    some = entries < N
    by_b = tl.zeros((TOKENS, ENTRIES), tl.float32)
    by_c = tl.zeros((TOKENS, ENTRIES), tl.float32)
    d_pairs = tl.zeros((TOKENS, TOKENS), tl.float32)
    for head in range(part * EACH, part * EACH + EACH):
        own = decays + (row * H + head) * ROWS * L
        entering, step = factors(own, tokens, L, ENTERING), factors(own, tokens, L, STEP)
        share = factors(own, tokens, L, LEAVING) * step
        scores = tl.zeros((TOKENS, TOKENS), tl.float32)
        state_at = ((row * K + chunk) * H + head) * P * N
        for p in range(0, P, CHANNELS):
            channels = p + tl.arange(0, CHANNELS)
            real = channels < P
            at = (first * H + head) * P
            x = load_tile(values + at, index, channels, H * P, valid, real)
            dy = load_tile(d_outputs + at, index, channels, H * P, valid, real)
            scores += tl.dot(dy.to(COMPUTE), tl.trans(x.to(COMPUTE)), input_precision=PRECISION)
            after = load_tile(d_states + state_at, channels, entries, N, real, some).to(COMPUTE)
            x = (x * share[:, None]).to(COMPUTE)
            by_b += tl.dot(x, after, input_precision=PRECISION)
            before = load_tile(states + state_at, channels, entries, N, real, some).to(COMPUTE)
            dy = (dy * entering[:, None]).to(COMPUTE)
            by_c += tl.dot(dy, before, input_precision=PRECISION)
        weight = pair_decays(own, tokens, L) * step[None, :]
        d_pairs += tl.where(visible, weight * scores, 0.0)
    at = (first * G + part * EACH // (H // G)) * N
    b = load_tile(B + at, index, entries, G * N, valid, some).to(COMPUTE)
    c = load_tile(C + at, index, entries, G * N, valid, some).to(COMPUTE)
    d_pairs = d_pairs.to(COMPUTE)
    by_b += tl.dot(tl.trans(d_pairs), c, input_precision=PRECISION)
    by_c += tl.dot(d_pairs, b, input_precision=PRECISION)
    to = (first * parts + part) * N
    store_tile(d_B + to, index, entries, parts * N, tokens < L, some, by_b)
    store_tile(d_C + to, index, entries, parts * N, tokens < L, some, by_c)


def backward(
    d_outputs: Tensor,
    d_final: Tensor | None,
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
    D: None = None,
) -> tuple[Tensor, ...]:
    """Start the backward kernels; arguments and results are those of the operator, without D."""
    assert D is None, "the caller adds it"
    decays = chunk_decays(values, dt, A, B, documents)
    states, _ = walk(values, B, decays, initial, adjoint=False)
    d_states, d_initial = walk(d_outputs, C, decays, d_final, adjoint=True)
    beside = (states, d_states)
    own = _head_gradients(d_outputs, values, decays, A, B, C, documents, *beside)
    shared = _shared_gradients(d_outputs, values, decays, B, C, documents, *beside)
    return (*own, *shared, d_initial, A.new_empty(0))


def _head_gradients(
    d_outputs: Tensor,
    values: Tensor,
    decays: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    states: Tensor,
    d_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, dt and A."""
    size = Sizes.of(values, B)
    batch, L, H, _, P, N, K = size
    how = plan("head", values, N)
    parts = triton.cdiv(P, how["CHANNELS"])
    d_values = torch.empty_like(values)
    d_dt, d_A = decays.new_empty(parts, batch, L, H), decays.new_empty(parts, batch, K, H)
    launch(
        _head_kernel, (batch * K * H, parts),
        d_outputs, values, decays, A, B, C, either(documents, decays), states, d_states,
        d_values, d_dt, d_A, *size[1:],
        flops=2 * batch * L * H * (CHUNK * (N + 2 * P) + 2 * P * N),
        PACKED=documents is not None, **how,
    )  # fmt: skip
    return d_values, _ordered_sum(d_dt, 0), d_A.sum((0, 1, 2))


def _shared_gradients(
    d_outputs: Tensor,
    values: Tensor,
    decays: Tensor,
    B: Tensor,
    C: Tensor,
    documents: Tensor | None,
    states: Tensor,
    d_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of B and C."""
    size = Sizes.of(values, B)
    batch, L, H, G, P, N, K = size
    # A program's heads must be in one group, so their number divides the group's.
    each = max(heads for heads in range(1, HEADS + 1) if H // G % heads == 0)
    parts, how = H // each, plan("shared", values, N)
    # Without partial sums the kernel writes the final dtype; otherwise float32, summed afterwards.
    dtype = B.dtype if parts == G else torch.float32
    d_B, d_C = (values.new_empty(batch, L, parts, N, dtype=dtype) for _ in range(2))
    launch(
        _shared_kernel, (batch * K * parts, triton.cdiv(N, how["ENTRIES"])),
        d_outputs, values, decays, B, C, either(documents, decays), states, d_states, d_B, d_C,
        *size[1:], each,
        flops=2 * batch * L * (H * P * (CHUNK + 2 * N) + 2 * parts * CHUNK * N),
        PACKED=documents is not None, **how,
    )  # fmt: skip
    by_group = (x.unflatten(2, (G, parts // G)) for x in (d_B, d_C))
    d_B, d_C = (_ordered_sum(x, 3).to(B.dtype) for x in by_group)
    return d_B, d_C


def _ordered_sum(parts: Tensor, dim: int) -> Tensor:
    return parts.squeeze(dim) if parts.shape[dim] == 1 else parts.sum(dim)
