"""The short causal convolution with SiLU, and its output in parts, fused on a CPU.

The composition in Mamba's block (Gu and Dao 2023, section 3.4).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.convolution.causal_conv import causal_conv, check_shapes, gradient_shapes, prepared
from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


def silu_conv(
    values: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, "E"],
    sizes: Sequence[int],
    initial: Float[Tensor, "B K-1 E"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L E_i"], ...]:
    """SiLU of the outputs of `causal_conv`, split into parts of `sizes` channels.

    On a CPU each direction is one pass over memory; the backward pass recomputes the input of the
    SiLU.

    Raises:
        ValueError: the shapes differ, the sizes do not sum to the channels, or the length is 0.
    """
    if sum(sizes) != values.shape[-1]:
        raise ValueError(
            f"silu_conv was given {values.shape[-1]} channels to split into {list(sizes)}; sizes "
            "must sum to the channels"
        )
    if path_of(values) is not Path.NATIVE:
        outputs = causal_conv(values, weight, bias, initial, documents).outputs
        return F.silu(outputs).split(list(sizes), dim=-1)
    check_shapes(values, weight, bias, initial, documents)
    tensors = prepared(values.float(), weight, bias, initial, documents)
    parts = _SiluConv.apply(*tensors, *sizes)
    assert isinstance(parts, tuple)
    return tuple(part.to(values.dtype) for part in parts)


class _SiluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Float32[Tensor, "B L E"],
        weight: Float32[Tensor, "E K"],
        bias: Float32[Tensor, "E"],
        initial: Float32[Tensor, "B K-1 E"] | None,
        documents: Int[Tensor, "B L"] | None,
        *sizes: int,
    ) -> tuple[Tensor, ...]:
        # save_for_backward accepts None, but its stub does not.
        saved = (values, weight, bias, initial, documents)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return tuple(_forward(*saved, list(sizes)))

    @staticmethod
    @differentiated_once("silu_conv")
    def backward(ctx: BackwardCFunction, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_outputs = [d.contiguous() for d in d_parts]
        d_values, d_weight, d_bias, d_initial = _backward(d_outputs, *saved)
        d_initial = None if saved[3] is None else d_initial
        return d_values, d_weight, d_bias, d_initial, None, *[None] * len(d_parts)


def _forward_shapes(values: Tensor, *inputs: object) -> list[Tensor]:
    sizes = inputs[-1]
    assert isinstance(sizes, Sequence)
    return [values.new_empty(*values.shape[:2], size) for size in sizes]


def _backward_shapes(
    _d_parts: Sequence[Tensor],
    values: Tensor,
    weight: Tensor,
    _bias: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, ...]:
    return gradient_shapes(values, values, weight, initial, documents)


# CPU only: elsewhere SiLU is a separate operation.
_forward = define_operator(
    "silu_conv_forward(Tensor values, Tensor weight, Tensor bias, Tensor? initial, "
    "Tensor? documents, int[] sizes) -> Tensor[]",
    _forward_shapes,
)
_backward = define_operator(
    "silu_conv_backward(Tensor[] d_parts, Tensor values, Tensor weight, Tensor bias, "
    "Tensor? initial, Tensor? documents) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
