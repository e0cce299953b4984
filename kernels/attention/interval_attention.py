"""Softmax attention of each query to an interval of keys, by the native and Triton kernels.

For windows, packed documents and checkpoints, the keys that a query sees are consecutive, and both
ends are nondecreasing over queries; one kernel serves them all. Source: Dao 2023,
"FlashAttention-2", sections 3.1 and 3.2: tiles of scores, and the log-sum-exp kept for the backward
pass. Changed: intervals, an optional own key per query, and no atomics.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


class Intervals(NamedTuple):
    """Each query sees keys first to past - 1; both are nondecreasing. One row may serve all."""

    first: Int[Tensor, "b L"]
    past: Int[Tensor, "b L"]


class Own(NamedTuple):
    """An additional key and value per query, visible only to it."""

    keys: Float[Tensor, "B L G P"]
    values: Float[Tensor, "B L G Q"]


def interval_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    seen: Intervals,
    own: Own | None = None,
    shown: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to its keys, on tensors that `path_of` sends to a compiled kernel.

    Scores are scaled by 1/sqrt(P). A query without keys gets zeros. Finite keys and values that a
    query does not see do not affect it, bit for bit. A NaN may reach queries in the same tile that
    do not see it, because their probability of 0 times NaN is NaN; likewise in gradients. Gradients
    use the float32 log-sum-exp, which loses digits for large scores: a relative 3e-4 at scores of a
    thousand. The CPU kernel computes in float32, supports neither `own` nor `shown`, and never puts
    queries without common keys in one tile.

    Args:
        queries: any number of queries.
        keys: G divides H, and query head h reads key head h // (H / G).
        values: one per key.
        seen: the interval of each query.
        own: an additional key and value per query.
        shown: keys that are visible at all; all if not given.
    """
    B, L = queries.shape[:2]
    first, past = (x.int().expand(B, L).contiguous() for x in seen)
    beside = (None, None) if own is None else (x.contiguous() for x in own)
    flags = None if shown is None else shown.to(torch.int8).contiguous()
    native = path_of(queries) is Path.NATIVE
    tensors = ((x.float() if native else x).contiguous() for x in (queries, keys, values))
    return _Interval.apply(*tensors, *beside, first, past, flags).to(queries.dtype)


def neighbours(documents: Int[Tensor, "b S"], queries: int, before: int, after: int) -> Intervals:
    """The interval of each of the last `queries` tokens: near tokens of its document.

    Args:
        documents: document of each token; each document is contiguous.
        queries: number of queries.
        before: most keys before the query's own.
        after: most keys after it.
    """
    S = documents.shape[1]
    place = torch.arange(S, device=documents.device).expand(documents.shape)
    changes = documents[:, 1:] != documents[:, :-1]
    # First and last token of each document, spread over its tokens by running extrema.
    begins = torch.where(F.pad(changes, (1, 0), value=True), place, 0).cummax(dim=1).values
    ends = torch.where(F.pad(changes, (0, 1), value=True), place + 1, S)
    ends = ends.flip(1).cummin(dim=1).values.flip(1)
    begins, ends, place = (x[:, S - queries :] for x in (begins, ends, place))
    return Intervals((place - before).maximum(begins), (place + after + 1).minimum(ends))


class _Interval(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor | None) -> Tensor:
        outputs, logs = _forward(*inputs)
        saved = (*inputs, outputs, logs)
        # save_for_backward accepts None, but its stub does not.
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return outputs

    @staticmethod
    @differentiated_once("interval_attention")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        *gradients, d_own_k, d_own_v = _backward(d_outputs.contiguous(), *saved)
        beside = (None, None) if saved[3] is None else (d_own_k, d_own_v)
        return (*gradients, *beside, None, None, None)


def _forward_shapes(q: Tensor, _k: Tensor, v: Tensor, *_others: Tensor | None) -> tuple:
    B, L, H, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)


def _backward_shapes(
    d_outputs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    *_others: Tensor | None,
) -> tuple:
    beside = (d_outputs.new_empty(0) if x is None else torch.empty_like(x) for x in (own_k, own_v))
    return *(torch.empty_like(x) for x in (q, k, v)), *beside


_INPUTS = (
    "Tensor queries, Tensor keys, Tensor values, Tensor? own_keys, Tensor? own_values, "
    "Tensor first, Tensor past, Tensor? shown"
)
_forward = define_operator(
    f"interval_attention_forward({_INPUTS}) -> (Tensor, Tensor)",
    _forward_shapes,
    "kernels.attention.interval_attention_triton:forward",
)
_backward = define_operator(
    f"interval_attention_backward(Tensor d_outputs, {_INPUTS}, Tensor outputs, Tensor logs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
    "kernels.attention.interval_attention_triton:backward",
)
