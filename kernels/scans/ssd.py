"""Mamba-2's state space duality (SSD): a recurrence with one decay per head, as matrix products.

Source: Dao and Gu 2024, "Transformers are SSMs", sections 6 and 7. Changed: initial and final
states with gradients, resets at document boundaries, and a closed-form backward pass that keeps
only the inputs.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of
from kernels.precision import without_autocast
from kernels.scans.not_finite import (
    NON_FINITE,
    filled_where,
    non_finite_tokens,
    tokens_after_non_finite,
)
from kernels.scans.ssd_chunks import ssd_in_chunks

CHUNK = 64
"""Tokens of a chunk, in every implementation. Longer chunks take more work inside, and keep fewer
states between them for the backward pass. `ssd_chunks.h` repeats the number; a test compares.
"""


class Scan(NamedTuple):
    """What a scan returns: the outputs, and the state after the last token."""

    outputs: Float[Tensor, "B L H P"]
    final: Float[Tensor, "B H P N"]


def ssd(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    initial: Float[Tensor, "B H P N"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
    D: Float[Tensor, "H"] | None = None,
) -> Scan:
    """Compute h[t] = exp(dt[t] A) h[t-1] + dt[t] values[t] (x) B[t] and outputs[t] = h[t] C[t].

    Accumulates in float32 and returns outputs in the dtype of `values`, the final state in float32
    (float64 in, float64 out). From a token with a non-finite input on, the outputs of its document
    are NaN and pass no gradient; other documents are unaffected.

    Args:
        values: the inputs of each head.
        dt: step sizes, at least 0; softplus is the caller's.
        A: rates, at most 0.
        B: the input map of each token; each group of H / G consecutive heads shares one.
        C: the output map of each token.
        initial: h[-1], zero if not given.
        documents: document of each token; each document is contiguous. Document 0 continues the
            initial state; where the id changes, the state is zero before the token.
        D: skip factor per head; D values[t] is added to the outputs if given.

    Raises:
        ValueError: the shapes differ, G does not divide H, or the length is 0.
    """
    _check_shapes(values, dt, A, B, C, initial, documents, D)
    if values.shape[1] == 1:
        # Decoding: one step of the recurrence takes a third of the time of a chunk's products.
        return ssd_reference(values, dt, A, B, C, initial, documents, D)
    if path_of(values) is Path.TRITON:
        outputs, final = _by_kernels(values, dt, A, B, C, initial, documents)
        outputs = outputs if D is None else torch.addcmul(outputs, D[:, None], values)
        return Scan(outputs.to(values.dtype), final)
    if documents is None or documents.is_meta:
        return _by_chunks(values, dt, A, B, C, initial, documents, D)
    non_finite, bad_initial = non_finite_tokens(values, dt, B, C, initial)
    if not (non_finite.any() or bad_initial.any()):
        return _by_chunks(values, dt, A, B, C, initial, documents, D)
    # 0 * NaN is NaN: the zeros that mask other documents in the chunk's matrix would not stop it.
    x, steps, enter, leave = (filled_where(tensor, non_finite) for tensor in (values, dt, B, C))
    start = None if initial is None else filled_where(initial, bad_initial)
    outputs, final = _by_chunks(x, steps, A, enter, leave, start, documents, D)
    affected = tokens_after_non_finite(non_finite, bad_initial, documents)
    return Scan(
        filled_where(outputs, affected, torch.nan), filled_where(final, affected[:, -1], torch.nan)
    )


def ssd_reference(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    initial: Float[Tensor, "B H P N"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
    D: Float[Tensor, "H"] | None = None,
) -> Scan:
    """Compute `ssd` token by token in plain torch, in float32 or wider."""
    accumulator = torch.promote_types(values.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(accumulator) for tensor in (values, dt, A, B, C))
    H, P = x.shape[2:]
    B, C = (tensor.repeat_interleave(H // tensor.shape[2], dim=2) for tensor in (B, C))
    state = x.new_zeros(x.shape[0], H, P, B.shape[3])
    state = state if initial is None else initial.to(accumulator)
    outputs = []
    for t in range(x.shape[1]):
        if documents is not None:
            before = documents[:, t - 1] if t else torch.zeros_like(documents[:, 0])
            state = torch.where((documents[:, t] == before)[:, None, None, None], state, 0.0)
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        outputs.append((state * C[:, t, :, None]).sum(-1))
    mixed = torch.stack(outputs, dim=1)
    mixed = mixed if D is None else _skipped(mixed, D, x)
    return Scan(mixed.to(values.dtype), state)


def _by_kernels(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    initial: Float[Tensor, "B H P N"] | None,
    documents: Int[Tensor, "B L"] | None,
) -> Scan:
    """Scan by the Triton kernels, which skip tokens of the document `NON_FINITE`."""
    ids = None if documents is None else documents.int()
    affected = None
    if ids is not None:
        affected = tokens_after_non_finite(*non_finite_tokens(values, dt, B, C, initial), ids)
        ids = ids.masked_fill(affected, NON_FINITE).contiguous()
    # One dtype for all operands of products, as tensor cores need.
    dtype = torch.promote_types(torch.promote_types(values.dtype, B.dtype), C.dtype)
    x, enter, leave = (tensor.to(dtype).contiguous() for tensor in (values, B, C))
    # Decays always in float32.
    steps, rates = dt.float().contiguous(), A.float().contiguous()
    start = None if initial is None else initial.float().contiguous()
    outputs, final = _Ssd.apply(x, steps, rates, enter, leave, start, ids, None)
    if affected is not None:
        final = filled_where(final, affected[:, -1], torch.nan)
    return Scan(outputs.to(values.dtype), final)


def _by_chunks(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    initial: Float[Tensor, "B H P N"] | None,
    documents: Int[Tensor, "B L"] | None,
    D: Float[Tensor, "H"] | None,
) -> Scan:
    """Scan on the CPU, by the compiled kernels or in plain torch; inputs must be finite."""
    if path_of(values) is Path.REFERENCE:
        with without_autocast(values):
            outputs, final = ssd_in_chunks(values, dt, A, B, C, initial, documents, CHUNK)
            outputs = outputs if D is None else _skipped(outputs, D, values)
        return Scan(outputs.to(values.dtype), final)
    tensors = (x.float().contiguous() for x in (values, dt, A, B, C))
    start = None if initial is None else initial.float().contiguous()
    ids = None if documents is None else documents.int().contiguous()
    skip = None if D is None else D.float().contiguous()
    outputs, final = _Ssd.apply(*tensors, start, ids, skip)
    return Scan(outputs.to(values.dtype), final)


class _Ssd(torch.autograd.Function):
    """The scan by the native or Triton operators."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Float[Tensor, "B L H P"],
        dt: Float[Tensor, "B L H"],
        A: Float[Tensor, "H"],
        B: Float[Tensor, "B L G N"],
        C: Float[Tensor, "B L G N"],
        initial: Float[Tensor, "B H P N"] | None,
        documents: Int[Tensor, "B L"] | None,
        D: Float[Tensor, "H"] | None,
    ) -> tuple[Tensor, Tensor]:
        # save_for_backward accepts None, but its stub does not.
        saved = (values, dt, A, B, C, initial, documents, D)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        # A final state that nothing uses then has gradient None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return _forward(*saved)

    @staticmethod
    @differentiated_once("ssd")
    def backward(
        ctx: BackwardCFunction, d_outputs: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_outputs = torch.zeros_like(saved[0]) if d_outputs is None else d_outputs.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        *gradients, d_initial, d_D = _backward(d_outputs, d_final, *saved)
        d_initial = d_initial if list(ctx.needs_input_grad)[5] else None
        return *gradients, d_initial, None, None if saved[7] is None else d_D


def _skipped(outputs: Tensor, D: Tensor, values: Tensor) -> Tensor:
    return torch.addcmul(outputs, D.to(outputs.dtype)[:, None], values.to(outputs.dtype))


def _check_shapes(
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
    D: Tensor | None,
) -> None:
    batch, L, H, P = values.shape
    G, N = B.shape[2:]
    expected = {
        "dt": (dt, (batch, L, H)),
        "A": (A, (H,)),
        "B": (B, (batch, L, G, N)),
        "C": (C, (batch, L, G, N)),
        "initial": (initial, (batch, H, P, N)),
        "documents": (documents, (batch, L)),
        "D": (D, (H,)),
    }
    if L == 0:
        raise ValueError("ssd was given no tokens; the length must be at least 1")
    if H % G:
        raise ValueError(f"ssd was given {G} groups for {H} heads; groups must divide heads")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"ssd {name} has shape {tuple(tensor.shape)}, but values of shape "
                f"{tuple(values.shape)}, {G} groups and a state of {N} need {shape}"
            )


def _forward_shapes(
    values: Tensor,
    dt: Tensor,
    _A: Tensor,
    B: Tensor,
    _C: Tensor,
    _initial: Tensor | None,
    _documents: Tensor | None,
    _D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, _, H, P = values.shape
    return torch.empty_like(values), dt.new_empty(batch, H, P, B.shape[3])


def _backward_shapes(
    _d_outputs: Tensor,
    _d_final: Tensor | None,
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    _initial: Tensor | None,
    _documents: Tensor | None,
    D: Tensor | None = None,
) -> tuple[Tensor, ...]:
    batch, _, H, P = values.shape
    d_initial, d_D = dt.new_empty(batch, H, P, B.shape[3]), A.new_empty(0 if D is None else H)
    return (*(torch.empty_like(x) for x in (values, dt, A, B, C)), d_initial, d_D)


_forward = define_operator(
    "ssd_forward(Tensor values, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial, "
    "Tensor? documents, Tensor? D=None) -> (Tensor, Tensor)",
    _forward_shapes,
    "kernels.scans.ssd_triton:forward",
)
_backward = define_operator(
    "ssd_backward(Tensor d_outputs, Tensor? d_final, Tensor values, Tensor dt, Tensor A, "
    "Tensor B, Tensor C, Tensor? initial, Tensor? documents, "
    "Tensor? D=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
    "kernels.scans.ssd_backward_triton:backward",
)
