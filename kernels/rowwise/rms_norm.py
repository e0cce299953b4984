"""RMS norm over groups of channels, optionally gated or followed by a rotation, fused on a CPU.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4. Unfused, a CPU
would write and read a tensor for each operation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of
from kernels.rowwise.rotary import rotate_halves


def rms_norm(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    groups: int = 1,
    gate: Float[Tensor, "*batch D"] | None = None,
) -> Float[Tensor, "*batch D"]:
    """Compute weight * z / sqrt(mean of z^2 + eps), z = x silu(gate), the mean over each group.

    Accumulates in float32 and returns the dtype of `x`. Deterministic, whatever the number of
    threads. Source: Zhang and Sennrich 2019, equation 4; gate and groups as in Mamba-2 (Dao and Gu
    2024, sections 7.1 and 8.1).

    Args:
        x: the inputs.
        weight: a factor for each channel of the last dimension.
        eps: added to mean squares.
        groups: number of equal parts of the last dimension, each normalised by itself.
        gate: z = x if not given.

    Raises:
        ValueError: the shapes differ, or the groups do not divide the channels.
    """
    _check_shapes(x, weight, groups, gate)
    if path_of(x) is not Path.NATIVE:
        return rms_norm_reference(x, weight, eps, groups, gate)
    gates = None if gate is None else _rows(gate)
    return _normed(x, gates, weight, groups, eps, Angles(None, None, 1))


def rotated_rms_norm(
    x: Float[Tensor, "B L H P"],
    weight: Float[Tensor, "P"],
    eps: float,
    cos: Float[Tensor, "b L 1 P"],
    sin: Float[Tensor, "b L 1 P"],
) -> Float[Tensor, "B L H P"]:
    """Apply `rms_norm` to each head, then `rotate_halves`, in one pass over memory.

    Returns the dtype of `x`.
    """
    _check_shapes(x, weight, 1, None)
    if path_of(x) is not Path.NATIVE:
        return rotate_halves(rms_norm_reference(x, weight, eps), cos, sin).to(x.dtype)
    angles = Angles(_rows(cos).contiguous(), _rows(sin).contiguous(), x.shape[2])
    return _normed(x, None, weight, 1, eps, angles)


def rms_norm_reference(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "D"],
    eps: float,
    groups: int = 1,
    gate: Float[Tensor, "*batch D"] | None = None,
) -> Float[Tensor, "*batch D"]:
    """Compute `rms_norm` in plain torch, in float32 or wider."""
    accumulator = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(accumulator)
    if gate is not None:
        gated = gated * F.silu(gate.to(accumulator))
    weight = weight.to(accumulator)
    if groups == 1:
        return F.rms_norm(gated, weight.shape, weight, eps).to(x.dtype)
    grouped = gated.unflatten(-1, (groups, -1))
    normed = F.rms_norm(grouped, grouped.shape[-1:], eps=eps).flatten(-2)
    return (normed * weight).to(x.dtype)


class Angles(NamedTuple):
    """The rotation after the norm, None for none; `heads` consecutive rows belong to one token."""

    cos: Float32[Tensor, "places P"] | None
    sin: Float32[Tensor, "places P"] | None
    heads: int


def _normed(
    x: Tensor, gates: Tensor | None, weight: Tensor, groups: int, eps: float, angles: Angles
) -> Tensor:
    rows, weights = _rows(x), weight.float().contiguous()
    outputs = _RMSNorm.apply(rows, gates, weights, groups, eps, *angles)
    assert isinstance(outputs, Tensor)
    return outputs.view(x.shape).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Float32[Tensor, "R D"],
        gate: Float32[Tensor, "R D"] | None,
        weight: Float32[Tensor, "D"],
        groups: int,
        eps: float,
        *rotation: Tensor | int | None,
    ) -> Tensor:
        # Saves the scale of each group, one number, instead of the normalised rows.
        outputs, scale = _forward(x, gate, weight, groups, eps, *rotation)
        *angles, heads = rotation
        ctx.heads = heads  # pyright: ignore[reportAttributeAccessIssue]
        # save_for_backward accepts None, but its stub does not.
        saved = (x, gate, weight, scale, *angles)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return outputs

    @staticmethod
    @differentiated_once("rms_norm")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scale, cos, sin = list(ctx.saved_tensors)
        heads = ctx.heads  # pyright: ignore[reportAttributeAccessIssue]
        d_x, d_gate, d_weight = _backward(_rows(d_outputs), x, gate, weight, scale, cos, sin, heads)
        # No gradient for groups, eps and the rotation.
        return d_x, None if gate is None else d_gate, d_weight, *[None] * 5


def _rows(x: Float[Tensor, "*batch D"]) -> Float32[Tensor, "R D"]:
    """All rows as a matrix; a view where strides allow, as the kernel takes any row stride."""
    rows = x.float().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_shapes(x: Tensor, weight: Tensor, groups: int, gate: Tensor | None) -> None:
    D = x.shape[-1]
    if D == 0 or D % groups:
        raise ValueError(f"rms_norm was given {D} channels, which {groups} groups do not divide")
    for name, tensor, shape in (("weight", weight, (D,)), ("gate", gate, x.shape)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"rms_norm {name} has shape {tuple(tensor.shape)}, but inputs of shape "
                f"{tuple(x.shape)} need {tuple(shape)}"
            )


def _forward_shapes(
    x: Tensor, _gate: Tensor | None, _weight: Tensor, groups: int, _eps: float, *_turn: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], groups)


def _backward_shapes(
    _d_outputs: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    _scale: Tensor,
    *_turn: object,
) -> tuple[Tensor, ...]:
    R, D = x.shape
    d_gate = x.new_empty(0 if gate is None else R, D)
    return x.new_empty(R, D), d_gate, torch.empty_like(weight)


_forward = define_operator(
    "rms_norm_forward(Tensor x, Tensor? gate, Tensor weight, int groups, float eps, "
    "Tensor? cos=None, Tensor? sin=None, int heads=1) -> (Tensor, Tensor)",
    _forward_shapes,
)
_backward = define_operator(
    "rms_norm_backward(Tensor d_outputs, Tensor x, Tensor? gate, Tensor weight, Tensor scale, "
    "Tensor? cos=None, Tensor? sin=None, int heads=1) -> (Tensor, Tensor, Tensor)",
    _backward_shapes,
)
