"""Pointwise parts of layers with their gradients by hand, in fewer passes over memory.

Autograd would write and read a tensor for every operation of them, which beside the matrix products
of a few hundred channels costs a CPU a good part of its time. Nothing is approximated.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """Divide by the root mean square of the last dimension, and scale (Zhang 2019)."""
    normed = _RMSNorm.apply(x, weight, eps)
    assert isinstance(normed, Tensor)
    return normed


def turn_halves(
    x: Float[Tensor, "B L H P"], cos: Float[Tensor, "B L 1 P"], sin: Float[Tensor, "B L 1 P"]
) -> Float[Tensor, "B L H P"]:
    """Turn each pair of channels (p, p + P/2) by an angle, which carries no gradient."""
    turned = _Turn.apply(x, cos, sin)
    assert isinstance(turned, Tensor)
    return turned


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = list(ctx.saved_tensors)
        products = d_normed * x
        along = (products @ weight)[..., None].mul_(scale.pow(3))
        d_weight = products.mul_(scale).flatten(0, -2).sum(0)
        d_x = (d_normed * weight).mul_(scale).addcmul_(x, along, value=-1 / x.shape[-1])
        return d_x, d_weight, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        left, right = sin.chunk(2, dim=-1)
        return _turned(x, cos, -left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_turned: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = list(ctx.saved_tensors)
        left, right = sin.chunk(2, dim=-1)
        return _turned(d_turned, cos, right, -left), None, None


def _turned(x: Tensor, cos: Tensor, from_right: Tensor, from_left: Tensor) -> Tensor:
    turned, half = x * cos, x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], from_right)
    turned[..., half:].addcmul_(x[..., :half], from_left)
    return turned
