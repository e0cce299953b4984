"""SwiGLU and gates by SiLU (Shazeer 2020, "GLU Variants Improve Transformer"), fused on a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


def swiglu(joint: Float[Tensor, "*batch F2"]) -> Float[Tensor, "*batch F"]:
    """silu(gate) * up, with the gates in the first half of the channels (Shazeer 2020, equation 6).

    The CPU kernel computes in float32; elsewhere torch's operations compute in the dtype of
    `joint`.

    Raises:
        ValueError: the channels are an odd number.
    """
    if joint.shape[-1] % 2:
        raise ValueError(f"swiglu was given {joint.shape[-1]} channels; give as many gates as ups")
    if _by_torch(joint):
        gate, up = joint.chunk(2, dim=-1)
        return F.silu(gate) * up
    gated = _SwiGLU.apply(_rows(joint), None)
    assert isinstance(gated, Tensor)
    return gated.view(*joint.shape[:-1], joint.shape[-1] // 2).to(joint.dtype)


def silu_gated(
    x: Float[Tensor, "*batch F"], gate: Float[Tensor, "*batch F"]
) -> Float[Tensor, "*batch F"]:
    """Multiply x by silu(gate): as `swiglu` computes, in the wider dtype of the two.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != gate.shape:
        raise ValueError(
            f"silu_gated was given {tuple(x.shape)} and gates of {tuple(gate.shape)}; give one for "
            "each number"
        )
    if _by_torch(x) or _by_torch(gate):
        return x * F.silu(gate)
    gated = _SwiGLU.apply(_rows(gate), _rows(x))
    assert isinstance(gated, Tensor)
    return gated.view(x.shape).to(torch.promote_types(x.dtype, gate.dtype))


def _by_torch(x: Tensor) -> bool:
    return path_of(x) is not Path.NATIVE


def _rows(x: Float[Tensor, "*batch F"]) -> Float32[Tensor, "R F"]:
    return x.float().reshape(-1, x.shape[-1]).contiguous()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, gates: Float32[Tensor, "R F"], ups: Float32[Tensor, "R F"] | None
    ) -> Tensor:
        # save_for_backward accepts None, but its stub does not.
        ctx.save_for_backward(gates, ups)  # pyright: ignore[reportArgumentType]
        return _forward(gates, ups)

    @staticmethod
    @differentiated_once("swiglu")
    def backward(ctx: BackwardCFunction, d_gated: Tensor) -> tuple[Tensor, Tensor | None]:
        gates, ups = list(ctx.saved_tensors)
        d_gates, d_ups = _backward(d_gated.contiguous(), gates, ups)
        return d_gates, None if ups is None else d_ups


def _forward_shapes(gates: Tensor, ups: Tensor | None) -> Tensor:
    R, F = gates.shape
    return gates.new_empty(R, F // 2 if ups is None else F)


def _backward_shapes(_d_gated: Tensor, gates: Tensor, ups: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gates), gates.new_empty(0) if ups is None else torch.empty_like(ups)


# Without ups, the gates are the front half of each row and the ups the other.
_forward = define_operator("swiglu_forward(Tensor gates, Tensor? ups) -> Tensor", _forward_shapes)
_backward = define_operator(
    "swiglu_backward(Tensor d_gated, Tensor gates, Tensor? ups) -> (Tensor, Tensor)",
    _backward_shapes,
)
