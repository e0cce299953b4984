"""The linear scan of gated recurrences: a decaying sum per channel, with decays given as logs.

Source: Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length",
section 2. Changed: initial and final states with gradients, resets at document boundaries, and no
cumulative sums of logs, whose rounding error grows with the length.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


class Scan(NamedTuple):
    """What a scan returns: the state after each token, and after the last one in float32."""

    outputs: Float[Tensor, "B L E"]
    final: Float[Tensor, "B E"]


def linear_scan(
    log_decay: Float[Tensor, "B L E"],
    values: Float[Tensor, "B L E"],
    initial: Float[Tensor, "B E"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Scan:
    """Compute h[t] = exp(log_decay[t]) h[t-1] + values[t], by channel.

    Accumulates in float32 and returns outputs in the dtype of `values`, the final state in float32
    (float64 in, float64 out). Deterministic, whatever the number of threads.

    Args:
        log_decay: logs of the decays, at most 0; float32 or wider, because rounding a decay near 1
            to half precision changes its time scale.
        values: what each token adds.
        initial: h[-1], zero if not given.
        documents: document of each token; each document is contiguous. Document 0 continues the
            initial state; where the id changes, the state is zero before the token.

    Raises:
        ValueError: the shapes differ, the length is 0, or the decays are in half precision.
    """
    _check(log_decay, values, initial, documents)
    if path_of(values) is Path.REFERENCE:
        return linear_scan_reference(log_decay, values, initial, documents)
    start = None if initial is None else initial.float().contiguous()
    ids = None if documents is None else documents.int().contiguous()
    outputs = _LinearScan.apply(
        log_decay.float().contiguous(), values.float().contiguous(), start, ids
    )
    return _scan(outputs, values)


def linear_scan_reference(
    log_decay: Float[Tensor, "B L E"],
    values: Float[Tensor, "B L E"],
    initial: Float[Tensor, "B E"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Scan:
    """Compute `linear_scan` token by token in plain torch, in float32 or wider."""
    accumulator = torch.promote_types(values.dtype, torch.float32)
    decays, added = log_decay.to(accumulator).exp(), values.to(accumulator)
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(accumulator)
    outputs = []
    for t in range(values.shape[1]):
        if documents is not None:
            before = documents[:, t - 1] if t else torch.zeros_like(documents[:, 0])
            state = torch.where((documents[:, t] == before)[:, None], state, 0.0)
        state = decays[:, t] * state + added[:, t]
        outputs.append(state)
    return _scan(torch.stack(outputs, dim=1), values)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        log_decay: Float32[Tensor, "B L E"],
        values: Float32[Tensor, "B L E"],
        initial: Float32[Tensor, "B E"] | None,
        documents: Int[Tensor, "B L"] | None,
    ) -> Tensor:
        outputs = _forward(log_decay, values, initial, documents)
        # The outputs are the states that the backward pass needs. save_for_backward accepts None,
        # but its stub does not.
        saved = (log_decay, outputs, initial, documents)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return outputs

    @staticmethod
    @differentiated_once("linear_scan")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        log_decay, outputs, initial, documents = list(ctx.saved_tensors)
        d_log_decay, d_values, d_initial = _backward(
            d_outputs.contiguous(), log_decay, outputs, initial, documents
        )
        return d_log_decay, d_values, None if initial is None else d_initial, None


def _scan(outputs: Tensor, values: Tensor) -> Scan:
    # A copy: a view would keep the whole sequence alive in a decoding state.
    return Scan(outputs.to(values.dtype), outputs[:, -1].clone())


def _check(
    log_decay: Tensor, values: Tensor, initial: Tensor | None, documents: Tensor | None
) -> None:
    batch, L, E = values.shape
    if L == 0:
        raise ValueError("linear_scan was given no tokens; the length must be at least 1")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"linear_scan log_decay is {log_decay.dtype}, which cannot represent slow decays; "
            "compute it in float32"
        )
    expected = {
        "log_decay": (log_decay, (batch, L, E)),
        "initial": (initial, (batch, E)),
        "documents": (documents, (batch, L)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"linear_scan {name} has shape {tuple(tensor.shape)}, but values of shape "
                f"{tuple(values.shape)} need {shape}"
            )


def _forward_shapes(
    _log_decay: Tensor, values: Tensor, _initial: Tensor | None, _documents: Tensor | None
) -> Tensor:
    return torch.empty_like(values)


def _backward_shapes(
    d_outputs: Tensor,
    _log_decay: Tensor,
    _outputs: Tensor,
    initial: Tensor | None,
    _documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, E = d_outputs.shape
    d_initial = d_outputs.new_empty(0 if initial is None else batch, E)
    return torch.empty_like(d_outputs), torch.empty_like(d_outputs), d_initial


_forward = define_operator(
    "linear_scan_forward(Tensor log_decay, Tensor values, Tensor? initial, Tensor? documents) "
    "-> Tensor",
    _forward_shapes,
    "kernels.scans.linear_scan_triton:forward",
)
_backward = define_operator(
    "linear_scan_backward(Tensor d_outputs, Tensor log_decay, Tensor outputs, Tensor? initial, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor)",
    _backward_shapes,
    "kernels.scans.linear_scan_triton:backward",
)
