"""The torch operator of the block-sparse Triton kernels, and its autograd function.

Source: Lee et al. 2024, "HiP Attention", section 3.3, as in `block_sparse_attention`. Query blocks
and their lists are flattened, ordered by row of the batch, then head.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import define_operator


class BlockSparseSizes(NamedTuple):
    """Batch size, query heads, key heads, and the sizes of `BlockSparsity`."""

    B: int
    H: int
    G: int
    key_block: int
    n_sink: int
    window: int


def attend_to_lists(
    queries: Float[Tensor, "M R P"],
    keys: Float[Tensor, "X P"],
    values: Float[Tensor, "X Q"],
    kept: Int[Tensor, "M K"],
    places: tuple[Int[Tensor, "M R"], Int[Tensor, " M"]],
    sizes: BlockSparseSizes,
) -> Float[Tensor, "M R Q"]:
    """Attend with the queries of each block, on tensors that `path_of` sends to Triton.

    Deterministic, gradients included. NaN and infinity stay in their document.

    Args:
        queries: rows of a block are consecutive in their document; padding repeats the last.
        keys: key t of a document is row `begins + G t`.
        values: one per key.
        kept: distinct key blocks of each list; -1 is an empty entry.
        places: position of each query in its document, and `begins`.
        sizes: sizes; M is B H times the query blocks per row and head.
    """
    tensors = (x.contiguous() for x in (queries, keys, values))
    positions, begins = places
    # The kernels divide by the number of entries: an empty list gets one empty entry.
    lists = kept if kept.shape[1] else kept.new_full((len(kept), 1), -1)
    where = (lists.int().contiguous(), positions.int().contiguous(), begins.contiguous())
    return _Listed.apply(*tensors, *where, sizes)


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        kept: Tensor,
        positions: Tensor,
        begins: Tensor,
        sizes: BlockSparseSizes,
    ) -> Tensor:
        inputs = (queries, keys, values, kept, positions, begins)
        outputs, logs = _forward(*inputs, *sizes)
        ctx.save_for_backward(*inputs, outputs, logs)
        ctx.sizes = sizes  # pyright: ignore[reportAttributeAccessIssue]
        return outputs

    @staticmethod
    @differentiated_once("block_sparse_attention")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        sizes = ctx.sizes  # pyright: ignore[reportAttributeAccessIssue]
        gradients = _backward(d_outputs.contiguous(), *ctx.saved_tensors, *sizes)
        return (*gradients, None, None, None, None)


def _forward_shapes(q: Tensor, _k: Tensor, v: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    M, R, _ = q.shape
    return v.new_empty(M, R, v.shape[1]), q.new_empty(M, R, dtype=torch.float32)


def _backward_shapes(
    _d_outputs: Tensor, q: Tensor, k: Tensor, v: Tensor, *_others: object
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (q, k, v))


_INPUTS = "Tensor queries, Tensor keys, Tensor values, Tensor kept, Tensor positions, Tensor begins"
_SIZES = "int B, int H, int G, int key_block, int n_sink, int window"
_forward = define_operator(
    f"block_sparse_attention_forward({_INPUTS}, {_SIZES}) -> (Tensor, Tensor)",
    _forward_shapes,
    "kernels.attention.block_sparse_attention_triton:forward",
)
_backward = define_operator(
    f"block_sparse_attention_backward(Tensor d_outputs, {_INPUTS}, Tensor outputs, Tensor logs, "
    f"{_SIZES}) -> (Tensor, Tensor, Tensor)",
    _backward_shapes,
    "kernels.attention.block_sparse_attention_backward_triton:backward",
)
