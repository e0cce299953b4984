"""A dense map whose output is split into parts, with a hand-written gradient that copies less.

Split by autograd, the parts' gradients are concatenated before the backward products, and kernels
copy their part of the output. At a few hundred channels these copies cost a CPU as much as a good
part of the products. Results are the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once, in_plain_torch


def linear_in_parts(
    x: Float[Tensor, "*batch I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None,
    sizes: Sequence[int],
) -> tuple[Float[Tensor, "*batch O_i"], ...]:
    """Map each token, and split the output channels into parts of the given sizes.

    When training on a CPU, each part is a product of its own, forward and backward. Under
    torch.compile the forward products are separate too, and the compiler sums their gradients.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return _products(x, weight, bias, sizes)
    if _by_torch(x):
        return F.linear(x, weight, bias).split(list(sizes), dim=-1)
    parts = _LinearInParts.apply(x, weight, bias, *sizes)
    assert isinstance(parts, tuple)
    return parts


def _by_torch(x: Tensor) -> bool:
    """Whether one product and a split is better: on GPUs, under autocast and in inference."""
    if x.device.type != "cpu" or in_plain_torch():
        return True
    return torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()


def _products(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    weights = weight.split(list(sizes))
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


class _LinearInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, *sizes: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return _products(x, weight, bias, sizes)

    @staticmethod
    @differentiated_once("linear_in_parts")
    def backward(ctx: BackwardCFunction, *d_parts: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = list(ctx.saved_tensors)
        sizes, tokens = [d.shape[-1] for d in d_parts], x.flatten(0, -2)
        d_x, d_weight = torch.empty_like(tokens), torch.empty_like(weight)
        d_rows = [d.flatten(0, -2) for d in d_parts]
        maps = zip(weight.split(sizes), d_weight.split(sizes), strict=True)
        for i, (rows, (w, into)) in enumerate(zip(d_rows, maps, strict=True)):
            torch.mm(rows.T, tokens, out=into)
            # The buffer is uninitialised: beta 0 ignores what it holds, even a NaN.
            d_x.addmm_(rows, w, beta=0 if i == 0 else 1)
        needs_bias = list(ctx.needs_input_grad)[2]
        d_bias = torch.cat([rows.sum(0) for rows in d_rows]) if needs_bias else None
        return d_x.view(x.shape), d_weight, d_bias, *[None] * len(sizes)
