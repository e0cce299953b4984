"""Rotary embeddings: pairs of channels turned by an angle, in one pass over memory on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from kernels.dispatch import Path, define_operator, path_of


def rotate_halves(
    x: Float[Tensor, "B L H P"], cos: Float[Tensor, "b L 1 P"], sin: Float[Tensor, "b L 1 P"]
) -> Float[Tensor, "B L H P"]:
    """Turn each pair of channels (p, p + P/2) by its angle (Su et al. 2021, section 3.4.2).

    Where no CPU kernel serves, and under a compiler, which fuses them, it is torch's operations in
    the wider dtype of channels and angles, which it returns; else it computes in float32.

    Args:
        x: P is even.
        cos: of every channel's angle, for all rows or for each; carries no gradient.
        sin: likewise.
    """
    turned = _Turn.apply(x, cos, sin)
    assert isinstance(turned, Tensor)
    return turned


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_turned: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = list(ctx.saved_tensors)
        return _turned(d_turned, cos, sin, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Turn channels, or gradients back by the transpose."""
    if path_of(x) is not Path.NATIVE:
        half = x.shape[-1] // 2
        turned, (left, right) = x * cos, sin.chunk(2, dim=-1)
        to_left, to_right = (right, -left) if back else (-left, right)
        turned[..., :half].addcmul_(x[..., half:], to_left)
        turned[..., half:].addcmul_(x[..., :half], to_right)
        return turned
    tokens = x.float().reshape(-1, *x.shape[2:]).contiguous()
    angles = (y.float().reshape(-1, y.shape[-1]).contiguous() for y in (cos, sin))
    return _turn(tokens, *angles, back).view(x.shape)


def _turn_shapes(x: Tensor, _cos: Tensor, _sin: Tensor, _back: bool) -> Tensor:
    return torch.empty_like(x)


_turn = define_operator(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _turn_shapes
)
