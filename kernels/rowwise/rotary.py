"""Rotary embeddings (Su et al. 2021, section 3.4.2), fused on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once, in_plain_torch
from kernels.dispatch import Path, define_operator, path_of


def rotate_halves(
    x: Float[Tensor, "B L H P"], cos: Float[Tensor, "b L 1 P"], sin: Float[Tensor, "b L 1 P"]
) -> Float[Tensor, "B L H P"]:
    """Rotate each pair of channels (p, p + P/2) by its angle.

    The CPU kernel computes in float32. Elsewhere torch's operations compute in the wider dtype of
    `x` and the angles, and return it.

    Args:
        x: P is even.
        cos: cosine of each channel's angle, for all rows or for each; gets no gradient.
        sin: likewise.
    """
    if in_plain_torch():
        return _rotate(x, cos, sin, back=False)
    rotated = _Rotate.apply(x, cos, sin)
    assert isinstance(rotated, Tensor)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, back=False)

    @staticmethod
    @differentiated_once("rotate_halves")
    def backward(ctx: BackwardCFunction, d_rotated: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = list(ctx.saved_tensors)
        return _rotate(d_rotated, cos, sin, back=True), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Rotate channels or, if `back`, apply the transpose, which maps gradients."""
    if path_of(x) is not Path.NATIVE:
        half = x.shape[-1] // 2
        rotated, (left, right) = x * cos, sin.chunk(2, dim=-1)
        # (l, r) -> (l cos - r sin, r cos + l sin); the transpose swaps the two terms with a sine.
        to_left, to_right = (right, -left) if back else (-left, right)
        rotated[..., :half].addcmul_(x[..., half:], to_left)
        rotated[..., half:].addcmul_(x[..., :half], to_right)
        return rotated
    tokens = x.float().reshape(-1, *x.shape[2:]).contiguous()
    angles = (y.float().reshape(-1, y.shape[-1]).contiguous() for y in (cos, sin))
    return _operator(tokens, *angles, back).view(x.shape)


def _operator_shapes(x: Tensor, _cos: Tensor, _sin: Tensor, _back: bool) -> Tensor:
    return torch.empty_like(x)


_operator = define_operator(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _operator_shapes
)
