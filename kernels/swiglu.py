"""The gate of a SwiGLU, in one pass over memory on a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from kernels.runtime import Path, define_operator, path_of


def swiglu(joint: Float[Tensor, "*batch F2"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) * up of channels that hold gates in front and ups behind (Shazeer 2020, (6)).

    Where no CPU kernel serves, and under a compiler, which fuses them, it is torch's operations in
    the dtype of `joint`; else it computes in float32.

    Raises:
        ValueError: the channels are an odd number.
    """
    if joint.shape[-1] % 2:
        raise ValueError(f"swiglu was given {joint.shape[-1]} channels; give as many gates as ups")
    if torch.compiler.is_compiling() or path_of(joint) is not Path.NATIVE:
        gate, up = joint.chunk(2, dim=-1)
        return F.silu(gate) * up
    rows = joint.float().reshape(-1, joint.shape[-1]).contiguous()
    gated = _SwiGLU.apply(rows)
    assert isinstance(gated, Tensor)
    return gated.view(*joint.shape[:-1], joint.shape[-1] // 2).to(joint.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, joint: Float32[Tensor, "R F2"]) -> Tensor:
        ctx.save_for_backward(joint)
        return _forward(joint)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_gated: Tensor) -> Tensor:
        (joint,) = list(ctx.saved_tensors)
        return _backward(d_gated.contiguous(), joint)


def _forward_shapes(joint: Tensor) -> Tensor:
    return joint.new_empty(joint.shape[0], joint.shape[1] // 2)


def _backward_shapes(_d_gated: Tensor, joint: Tensor) -> Tensor:
    return torch.empty_like(joint)


_forward = define_operator("swiglu_forward(Tensor joint) -> Tensor", _forward_shapes)
_backward = define_operator(
    "swiglu_backward(Tensor d_gated, Tensor joint) -> Tensor", _backward_shapes
)
