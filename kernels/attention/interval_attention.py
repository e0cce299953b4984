"""Softmax attention of each query to an interval of keys: what the compiled kernels compute.

Windows, packed documents and earlier checkpoints all show a query a run of neighbouring keys whose
ends only move forward from query to query, so one kernel serves them. Source: Dao 2023,
"FlashAttention-2", sections 3.1 and 3.2: tiles of scores, the log of the softmax's sum kept for the
backward pass. Changed: intervals, one own key beside them, and no atomic sums.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from kernels.dispatch import Path, define_operator, path_of


class Intervals(NamedTuple):
    """Keys first to past - 1 are seen by a query, in every row or all; neither falls along it."""

    first: Int[Tensor, "b L"]
    past: Int[Tensor, "b L"]


class Own(NamedTuple):
    """A key and value for each query that it alone sees."""

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

    Scores are scaled by 1/sqrt(P). A query that sees nothing gets zeros. Keys that a query does not
    see change nothing for it, bit for bit, where they and their values are finite. One that is not
    may reach queries of its tile that do not see it: their share in it is 0, and 0 times NaN is
    NaN. The same holds for gradients and queries. Gradients come from the log of each softmax's
    sum, which as a float32 costs them digits where scores are large: at a thousand, 3e-4. The CPU
    kernel computes in float32, knows neither own keys nor hidden ones, and has no tile across a gap
    between what neighbouring queries see.

    Args:
        queries: of any number.
        keys: G divides H, and query head h reads key head h // (H / G).
        values: one for each key.
        seen: what each query sees.
        own: what each query sees besides.
        shown: keys that can be seen at all; all if not given.
    """
    B, L = queries.shape[:2]
    first, past = (x.int().expand(B, L).contiguous() for x in seen)
    beside = (None, None) if own is None else (x.contiguous() for x in own)
    flags = None if shown is None else shown.to(torch.int8).contiguous()
    native = path_of(queries) is Path.NATIVE
    tensors = ((x.float() if native else x).contiguous() for x in (queries, keys, values))
    return _Interval.apply(*tensors, *beside, first, past, flags).to(queries.dtype)


def neighbours(documents: Int[Tensor, "b S"], queries: int, before: int, after: int) -> Intervals:
    """What each of the last `queries` tokens sees: those of its document that are near enough.

    Args:
        documents: document of each token; each document is contiguous.
        queries: tokens that see others.
        before: keys before its own that a token sees at most.
        after: keys after its own.
    """
    S = documents.shape[1]
    place = torch.arange(S, device=documents.device).expand(documents.shape)
    changes = documents[:, 1:] != documents[:, :-1]
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
    @once_differentiable
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
