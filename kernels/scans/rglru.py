"""The gates of an RG-LRU (De et al. 2024, "Griffin", section 2.4), fused on a CPU."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


class Steps(NamedTuple):
    """One step of a gated recurrence: log decay and input factor, in float32 or wider."""

    log_decay: Float[Tensor, "B L E"]
    write: Float[Tensor, "B L E"]


def rglru(
    recurrence: Float[Tensor, "B L E"],
    inputs: Float[Tensor, "B L E"],
    rate: Float[Tensor, "E"],
    begins: Bool[Tensor, "B L"],
    candidate: Float[Tensor, "B L E"] | None = None,
) -> Steps:
    """log_decay = -rate r, write = i sqrt(1 - decay^2), with gates r and i (De et al. 2024, 2.4).

    The derivative of the square root is bounded by 1000, as in the authors' release, so that decays
    near 1 can be learned.

    Args:
        recurrence: the gate r before its sigmoid.
        inputs: the gate i before its sigmoid.
        rate: the rate of each channel with r = 1, at least 0.
        begins: marks the first token of each document, which has no state to keep and writes i.
        candidate: multiplies `write` by its tanh; None for a factor of 1.
    """
    maps = (recurrence, inputs) if candidate is None else (recurrence, inputs, candidate)
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps]
    if torch.compiler.is_compiling() or path_of(wide[0]) is not Path.NATIVE:
        return rglru_reference(wide[0], wide[1], rate, begins, *wide[2:])
    recurrence, inputs, *rest = (x.contiguous() for x in wide)
    marks = begins.expand(recurrence.shape[:2]).contiguous()
    rates = rate.float().contiguous()
    return Steps(*_RGLRU.apply(recurrence, inputs, rates, marks, *rest))


def rglru_reference(
    recurrence: Float[Tensor, "B L E"],
    inputs: Float[Tensor, "B L E"],
    rate: Float[Tensor, "E"],
    begins: Bool[Tensor, "B L"],
    candidate: Float[Tensor, "B L E"] | None = None,
) -> Steps:
    """Compute `rglru` in plain torch, in the dtype of the maps."""
    log_decay = -rate * torch.sigmoid(recurrence)
    # 1 - decay^2 without cancellation for decays near 1, where a recurrence remembers longest.
    scale = _BoundedSqrt.apply(-torch.expm1(2 * log_decay))
    write = torch.sigmoid(inputs) * scale.masked_fill(begins[:, :, None], 1.0)
    return Steps(log_decay, write if candidate is None else write * torch.tanh(candidate))


class _RGLRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        recurrence: Tensor,
        inputs: Tensor,
        rate: Tensor,
        begins: Tensor,
        candidate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        saved = (recurrence, inputs, rate, begins, candidate)
        # save_for_backward accepts None, but its stub does not.
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return _forward(*saved)

    @staticmethod
    @differentiated_once("rglru")
    def backward(
        ctx: BackwardCFunction, d_log_decay: Tensor, d_write: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_maps = _backward(d_log_decay.contiguous(), d_write.contiguous(), *saved)
        return (*d_maps[:3], None, None if saved[4] is None else d_maps[3])


class _BoundedSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: BackwardCFunction, d_root: Tensor) -> Tensor:
        (x,) = list(ctx.saved_tensors)
        # 1 / (2 sqrt(x)) = (4 x)^-1/2, and 1e-6 bounds it by 1000.
        return d_root * (4 * x).clamp(min=1e-6).rsqrt()


def _forward_shapes(recurrence: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(recurrence), torch.empty_like(recurrence)


def _backward_shapes(
    _d_log_decay: Tensor,
    _d_write: Tensor,
    recurrence: Tensor,
    inputs: Tensor,
    rate: Tensor,
    _begins: Tensor,
    candidate: Tensor | None,
) -> tuple[Tensor, ...]:
    d_candidate = recurrence.new_empty(0) if candidate is None else torch.empty_like(candidate)
    return (*(torch.empty_like(x) for x in (recurrence, inputs, rate)), d_candidate)


_forward = define_operator(
    "rglru_forward(Tensor recurrence, Tensor inputs, Tensor rate, Tensor begins, "
    "Tensor? candidate) -> (Tensor, Tensor)",
    _forward_shapes,
)
_backward = define_operator(
    "rglru_backward(Tensor d_log_decay, Tensor d_write, Tensor recurrence, Tensor inputs, "
    "Tensor rate, Tensor begins, Tensor? candidate) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
)
