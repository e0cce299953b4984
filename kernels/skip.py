"""The input itself beside what a scan makes of it; a CPU goes back in one pass over memory."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from kernels.runtime import Path, define_operator, path_of


def add_skip(
    outputs: Float[Tensor, "B L H P"],
    D: Float[Tensor, "H"],
    values: Float[Tensor, "B L H P"],
) -> Float[Tensor, "B L H P"]:
    """Compute outputs + D values, a factor for each head (Gu and Dao 2023, section 2).

    Where no CPU kernel serves, and under a compiler, which fuses them, it is torch's operations.
    Returns the dtype of `values`.
    """
    alike = outputs.dtype == D.dtype == values.dtype == torch.float32
    if torch.compiler.is_compiling() or not alike or path_of(values) is not Path.NATIVE:
        return torch.addcmul(outputs, D[:, None], values).to(values.dtype)
    rates = D[:, None].expand(values.shape[2:]).flatten()
    mixed = _Skip.apply(outputs.flatten(2), rates, values.flatten(2))
    assert isinstance(mixed, Tensor)
    return mixed.view(values.shape)


class _Skip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        outputs: Float32[Tensor, "B L E"],
        rates: Float32[Tensor, "E"],
        values: Float32[Tensor, "B L E"],
    ) -> Tensor:
        ctx.save_for_backward(rates, values)
        return torch.addcmul(outputs, rates, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rates, values = list(ctx.saved_tensors)
        rows = (x.flatten(0, 1).contiguous() for x in (d_mixed, values))
        d_values, d_rates = _backward(*rows, rates)
        return d_mixed, d_rates, d_values.view(values.shape)


def _backward_shapes(_d_mixed: Tensor, values: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(rates)


_backward = define_operator(
    "skip_backward(Tensor d_outputs, Tensor values, Tensor D) -> (Tensor, Tensor)",
    _backward_shapes,
)
