"""Attention to an interval of keys as Triton kernels (Dao 2023, "FlashAttention-2", 3.1 and 3.2).

A program handles a tile of queries (outputs and the gradient of queries) or a tile of keys (their
gradients), and loops over the other side in order: sums have a fixed order, and there are no
atomics. Softmax statistics and sums are float32. Products take bfloat16 operands if activations are
bfloat16, as flash attention does, else float32; in the interpreter always float32. Loops are not
pipelined, because they carry sums (see `launch`). Not yet run on a GPU: tested in Triton's
interpreter, compiled ahead of time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import interpreting, is_recording, launch

# Tile sizes (queries, keys) and warps by (float32 operands, heads wider than 64). No spills on
# sm_80, sm_90 and sm_100 with heads of 64 and 128.
FORWARD = {
    (False, False): (64, 64, 4),
    (False, True): (64, 32, 4),
    (True, False): (32, 16, 4),
    (True, True): (32, 16, 8),
}
QUERIES = {
    (False, False): (64, 32, 4),
    (False, True): (64, 32, 4),
    (True, False): (32, 16, 4),
    (True, True): (32, 16, 8),
}
KEYS = {
    (False, False): (32, 32, 4),
    (False, True): (64, 32, 4),
    (True, False): (32, 16, 4),
    (True, True): (16, 16, 8),
}
# Channels per partial product of wide float32 heads: without tensor cores each thread holds the
# operands in registers, so all channels at once would spill.
PART = 32
# Elements of a head's keys, or values, per program of `_own_kernel`: 48 registers.
OWN_NUMBERS = 512


@triton.jit
def load_rows(
    x, tokens, real, stride, WIDTH, PADDED: tl.constexpr, DOT: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Load one head's channels of some tokens; zeros outside the tensor."""
    channels = tl.arange(0, PADDED)
    places = x + tokens.to(tl.int64)[:, None] * stride + channels[None, :]
    mask = real[:, None] & (channels < WIDTH)[None, :]
    # Via float32: the interpreter does not compute correctly in bfloat16.
    return tl.load(places, mask=mask, other=0.0).to(tl.float32).to(DOT)


@triton.jit
def products(
    query, key, q, k, tokens, places, real, there, q_stride, k_stride,
    WIDTH: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of all rows of two tiles, PART channels at a time, or all at once if PART is 0.

    Parts are loaded again from q and k, so that only one part has to be in registers.
    """
    if PART == 0:
        sums = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        sums = tl.zeros((tokens.shape[0], places.shape[0]), tl.float32)
        for begin in range(0, WIDTH, PART):
            left = load_rows(q + begin, tokens, real, q_stride, WIDTH - begin, PART, DOT)
            right = load_rows(k + begin, places, there, k_stride, WIDTH - begin, PART, DOT)
            sums += tl.dot(left, tl.trans(right), input_precision="ieee")
    return sums


@triton.jit
def store_rows(
    x, tile, tokens, real, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr
) -> None:  # fmt: skip
    """Store one head's channels of some tokens, within the tensor."""
    channels = tl.arange(0, PADDED)
    places = x + tokens.to(tl.int64)[:, None] * stride + channels[None, :]
    mask = real[:, None] & (channels < WIDTH)[None, :]
    tl.store(places, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _visible(first, past, places, shown, row, S, SHOWN: tl.constexpr):
    """Mask of the keys that each query sees; the first three arguments broadcast to the mask."""
    seen = (places >= first) & (places < past)
    if SHOWN:
        flags = tl.load(shown + row * S + places, mask=places < S, other=0)
        seen = seen & (flags != 0)
    return seen


@triton.jit
def _own_score(query, own_k, tokens, real, G, scale, P: tl.constexpr, PP: tl.constexpr):
    key = load_rows(own_k, tokens, real, G * P, P, PP, tl.float32)
    return tl.sum(query.to(tl.float32) * key, axis=1) * scale, key


@triton.jit
def _forward_kernel(
    q, k, v, own_k, own_v, first, past, shown, outputs, logs, L, S, H, G, scale,
    OWN: tl.constexpr, SHOWN: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr,
    QQ: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    # Later queries may see more keys. Starting with them balances the load.
    tokens = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real, shared = tokens < L, head // (H // G)
    # Rows past the end see nothing, from S to 0, and do not widen the loop over keys.
    begin = tl.load(first + row * L + tokens, mask=real, other=S)
    end = tl.load(past + row * L + tokens, mask=real, other=0)
    at_q = q + (row * L * H + head) * P
    query = load_rows(at_q, tokens, real, H * P, P, PP, DOT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, QQ), tl.float32)
    if OWN:
        # The own key starts the online softmax: its power relative to itself is 1.
        top, _ = _own_score(
            query, own_k + (row * L * G + shared) * P, tokens, real, G, scale, P, PP
        )
        total += 1.0
        own = own_v + (row * L * G + shared) * Q
        mixed += load_rows(own, tokens, real, G * Q, Q, QQ, tl.float32)
    keys, values = k + (row * S * G + shared) * P, v + (row * S * G + shared) * Q
    for start in range(tl.min(begin), tl.max(end), COLUMNS):
        places = start + tl.arange(0, COLUMNS)
        there = places < S
        key = load_rows(keys, places, there, G * P, P, PP, DOT)
        scores = scale * products(
            query, key, at_q, keys, tokens, places, real, there, H * P, G * P, P, PART, DOT
        )
        seen = _visible(begin[:, None], end[:, None], places[None, :], shown, row, S, SHOWN)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # A query without any key so far: -inf minus -inf would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        # Online softmax: earlier sums are rescaled to the new maximum.
        share, kept = tl.exp(scores - level[:, None]), tl.exp(top - level)
        value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
        added = tl.dot(share.to(DOT), value, input_precision="ieee")
        mixed = mixed * kept[:, None] + added
        total = total * kept + tl.sum(share, axis=1)
        top = higher
    at = outputs + (row * L * H + head) * Q
    # Padding and queries without keys have a sum of 0.
    some = tl.where(total > 0, total, 1.0)
    store_rows(at, mixed / some[:, None], tokens, real, H * Q, Q, QQ)
    log = tl.where(total > 0, top + tl.log(some), 0.0)
    tl.store(logs + (row * H + head) * L + tokens, log, mask=real)


@triton.jit
def _query_kernel(
    d_outputs, q, k, v, own_k, own_v, first, past, shown, outputs, logs, d_q, carried,
    L, S, H, G, scale,
    OWN: tl.constexpr, SHOWN: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr,
    QQ: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The gradient of queries; also writes sum(outputs * d_outputs) per row for other kernels."""
    tokens = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real, shared = tokens < L, head // (H // G)
    begin = tl.load(first + row * L + tokens, mask=real, other=S)
    end = tl.load(past + row * L + tokens, mask=real, other=0)
    lines = (row * H + head) * L + tokens
    log = tl.load(logs + lines, mask=real, other=0.0)
    at = (row * L * H + head) * Q
    at_q = q + (row * L * H + head) * P
    query = load_rows(at_q, tokens, real, H * P, P, PP, DOT)
    at_d = d_outputs + at
    given = load_rows(at_d, tokens, real, H * Q, Q, QQ, DOT)
    mixed = load_rows(outputs + at, tokens, real, H * Q, Q, QQ, tl.float32)
    moment = tl.sum(given.to(tl.float32) * mixed, axis=1)
    tl.store(carried + lines, moment, mask=real)
    d_query = tl.zeros((ROWS, PP), tl.float32)
    if OWN:
        at_k, at_v = (row * L * G + shared) * P, (row * L * G + shared) * Q
        score, own = _own_score(query, own_k + at_k, tokens, real, G, scale, P, PP)
        own_value = load_rows(own_v + at_v, tokens, real, G * Q, Q, QQ, tl.float32)
        d_of_own = tl.sum(given.to(tl.float32) * own_value, axis=1) - moment
        # dS = P * (dP - rowsum(dO * O)) (Dao 2023, algorithm 2), for the own key.
        d_own = tl.exp(score - log) * d_of_own
        d_query += tl.where(real, d_own, 0.0)[:, None] * own
    keys, values = k + (row * S * G + shared) * P, v + (row * S * G + shared) * Q
    for start in range(tl.min(begin), tl.max(end), COLUMNS):
        places = start + tl.arange(0, COLUMNS)
        there = places < S
        key = load_rows(keys, places, there, G * P, P, PP, DOT)
        scores = scale * products(
            query, key, at_q, keys, tokens, places, real, there, H * P, G * P, P, PART, DOT
        )
        seen = _visible(begin[:, None], end[:, None], places[None, :], shown, row, S, SHOWN)
        share = tl.exp(tl.where(seen, scores - log[:, None], float("-inf")))
        value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
        d_share = products(
            given, value, at_d, values, tokens, places, real, there, H * Q, G * Q, Q, PART, DOT
        )
        d_score = tl.where(seen, share * (d_share - moment[:, None]), 0.0)
        d_query += tl.dot(d_score.to(DOT), key, input_precision="ieee")
    store_rows(d_q + (row * L * H + head) * P, d_query * scale, tokens, real, H * P, P, PP)


@triton.jit
def _key_kernel(
    d_outputs, q, k, v, first, past, shown, logs, carried, lowest, highest, d_k, d_v,
    L, S, H, G, scale,
    SHOWN: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, summed over queries and their heads in order."""
    tile, shared, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    places = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = places < S
    at_k, at_v = (row * S * G + shared) * P, (row * S * G + shared) * Q
    keys, values = k + at_k, v + at_v
    key = load_rows(keys, places, there, G * P, P, PP, DOT)
    value = load_rows(values, places, there, G * Q, Q, QQ, DOT)
    d_key = tl.zeros((COLUMNS, PP), tl.float32)
    d_value = tl.zeros((COLUMNS, QQ), tl.float32)
    low = tl.load(lowest + row * tl.num_programs(0) + tile)
    high = tl.load(highest + row * tl.num_programs(0) + tile)
    for head in range(shared * (H // G), (shared + 1) * (H // G)):
        for start in range(low, high, ROWS):
            tokens = start + tl.arange(0, ROWS)
            real = tokens < L
            begin = tl.load(first + row * L + tokens, mask=real, other=S)
            end = tl.load(past + row * L + tokens, mask=real, other=0)
            lines = (row * H + head) * L + tokens
            log = tl.load(logs + lines, mask=real, other=0.0)
            moment = tl.load(carried + lines, mask=real, other=0.0)
            at_q, at_d = q + (row * L * H + head) * P, d_outputs + (row * L * H + head) * Q
            query = load_rows(at_q, tokens, real, H * P, P, PP, DOT)
            given = load_rows(at_d, tokens, real, H * Q, Q, QQ, DOT)
            scores = scale * products(
                key, query, keys, at_q, places, tokens, there, real, G * P, H * P, P, PART, DOT
            )
            seen = _visible(begin[None, :], end[None, :], places[:, None], shown, row, S, SHOWN)
            share = tl.exp(tl.where(seen, scores - log[None, :], float("-inf")))
            d_value += tl.dot(share.to(DOT), given, input_precision="ieee")
            d_share = products(
                value, given, values, at_d, places, tokens, there, real, G * Q, H * Q, Q, PART, DOT
            )
            d_score = tl.where(seen, share * (d_share - moment[None, :]), 0.0)
            d_key += tl.dot(d_score.to(DOT), query, input_precision="ieee")
    store_rows(d_k + at_k, d_key * scale, places, there, G * P, P, PP)
    store_rows(d_v + at_v, d_value, places, there, G * Q, Q, QQ)


@triton.jit
def _own_kernel(
    d_outputs, q, own_k, own_v, logs, carried, d_own_k, d_own_v, L, H, G, scale,
    P: tl.constexpr, Q: tl.constexpr, PP: tl.constexpr, QQ: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of own keys and values, summed over the query heads in order."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    shared, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    real = tokens < L
    at_k, at_v = (row * L * G + shared) * P, (row * L * G + shared) * Q
    value = load_rows(own_v + at_v, tokens, real, G * Q, Q, QQ, tl.float32)
    d_key = tl.zeros((ROWS, PP), tl.float32)
    d_value = tl.zeros((ROWS, QQ), tl.float32)
    for head in range(shared * (H // G), (shared + 1) * (H // G)):
        lines = (row * H + head) * L + tokens
        log = tl.load(logs + lines, mask=real, other=0.0)
        moment = tl.load(carried + lines, mask=real, other=0.0)
        query = load_rows(q + (row * L * H + head) * P, tokens, real, H * P, P, PP, tl.float32)
        given = load_rows(
            d_outputs + (row * L * H + head) * Q, tokens, real, H * Q, Q, QQ, tl.float32
        )
        score, _ = _own_score(query, own_k + at_k, tokens, real, G, scale, P, PP)
        share = tl.exp(score - log)
        d_score = share * (tl.sum(given * value, axis=1) - moment)
        d_key += d_score[:, None] * query
        d_value += share[:, None] * given
    store_rows(d_own_k + at_k, d_key * scale, tokens, real, G * P, P, PP)
    store_rows(d_own_v + at_v, d_value, tokens, real, G * Q, Q, QQ)


def forward(
    q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
    first: Tensor, past: Tensor, shown: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Start the forward kernel; arguments and results are those of the operator."""
    (B, L, H, _), (S, G, Q) = q.shape, v.shape[1:]
    outputs, logs = q.new_empty(B, L, H, Q), q.new_empty(B, H, L, dtype=torch.float32)
    sizes = _sizes(q, k, v)
    rows, columns, warps = _tile(FORWARD, sizes)
    launch(
        _forward_kernel,
        (triton.cdiv(L, rows), H, B),
        q, k, v, _or(own_k, q), _or(own_v, q), first, past, _or(shown, first), outputs, logs,
        L, S, H, G, q.shape[3] ** -0.5,
        num_warps=warps, OWN=own_k is not None, SHOWN=shown is not None, **sizes,
        ROWS=rows, COLUMNS=columns, PART=_part(sizes),
    )  # fmt: skip
    return outputs, logs


def backward(
    d_outputs: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None,
    own_v: Tensor | None, first: Tensor, past: Tensor, shown: Tensor | None,
    outputs: Tensor, logs: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Start the backward kernels; arguments and results are those of the operator."""
    (B, L, H, P), (S, G) = q.shape, v.shape[1:3]
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    carried, sizes, scale = torch.empty_like(logs), _sizes(q, k, v), P**-0.5
    rows, columns, warps = _tile(QUERIES, sizes)
    launch(
        _query_kernel,
        (triton.cdiv(L, rows), H, B),
        d_outputs, q, k, v, _or(own_k, q), _or(own_v, q), first, past, _or(shown, first),
        outputs, logs, d_q, carried, L, S, H, G, scale,
        num_warps=warps, OWN=own_k is not None, SHOWN=shown is not None, **sizes,
        ROWS=rows, COLUMNS=columns, PART=_part(sizes),
    )  # fmt: skip
    rows, columns, warps = _tile(KEYS, sizes)
    lowest, highest = _seers(first, past, S, columns)
    launch(
        _key_kernel,
        (triton.cdiv(S, columns), G, B),
        d_outputs, q, k, v, first, past, _or(shown, first), logs, carried, lowest, highest,
        d_k, d_v, L, S, H, G, scale,
        num_warps=warps, SHOWN=shown is not None, **sizes, ROWS=rows, COLUMNS=columns,
        PART=_part(sizes),
    )  # fmt: skip
    if own_k is None or own_v is None:
        return d_q, d_k, d_v, q.new_empty(0), q.new_empty(0)
    d_own_k, d_own_v = torch.empty_like(own_k), torch.empty_like(own_v)
    del sizes["DOT"]
    rows = max(1, OWN_NUMBERS // max(sizes["PP"], sizes["QQ"]))
    launch(
        _own_kernel,
        (triton.cdiv(L, rows), G, B),
        d_outputs, q, own_k, own_v, logs, carried, d_own_k, d_own_v, L, H, G, scale,
        num_warps=4, **sizes, ROWS=rows,
    )  # fmt: skip
    return d_q, d_k, d_v, d_own_k, d_own_v


def _seers(first: Tensor, past: Tensor, S: int, columns: int) -> tuple[Tensor, Tensor]:
    """The range of queries that see a key of each tile, by binary search in monotonic bounds."""
    begins = torch.arange(0, S, columns, device=first.device, dtype=first.dtype)
    begins = begins.expand(first.shape[0], -1).contiguous()
    # From the first query whose interval reaches the tile's first key, to the first whose interval
    # begins behind its last.
    lowest = torch.searchsorted(past, begins, right=True, out_int32=True)
    return lowest, torch.searchsorted(first, begins + columns, out_int32=True)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, object]:
    P, Q = q.shape[3], v.shape[3]
    narrow = all(x.dtype is torch.bfloat16 for x in (q, k, v))
    compiled = is_recording() or not interpreting()
    return {
        "P": P,
        "Q": Q,
        "PP": max(16, triton.next_power_of_2(P)),
        "QQ": max(16, triton.next_power_of_2(Q)),
        "DOT": tl.bfloat16 if narrow and compiled else tl.float32,
    }


def _tile(table: dict, sizes: dict) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps."""
    if interpreting() and not is_recording():
        return 64, 64, 4
    return table[sizes["DOT"] == tl.float32, max(sizes["PP"], sizes["QQ"]) > 64]


def _part(sizes: dict) -> int:
    """Channels that a product takes at once; 0 for all."""
    wide = max(sizes["PP"], sizes["QQ"]) > 64
    return PART if wide and sizes["DOT"] == tl.float32 else 0


def _or(given: Tensor | None, instead: Tensor) -> Tensor:
    """The tensor or, if it is None, a placeholder that the kernel does not read."""
    return instead if given is None else given
