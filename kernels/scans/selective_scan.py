"""The selective scan of Mamba-1: a gated recurrence per channel and state entry.

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section
3.2. Changed: initial and final states with gradients, and resets at document boundaries.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of

# Tokens between kept states on a CPU; the backward pass recomputes the states between. 16 make it a
# fifth slower, because a chunk then exceeds the L1 cache; 4 double the kept memory.
CHUNK = 8
# The same for Triton, where a chunk is a program; a longer one keeps less and runs fewer programs.
TRITON_CHUNK = 32


class Scan(NamedTuple):
    """What a scan returns: the outputs, and the state after the last token."""

    outputs: Float[Tensor, "B L E"]
    final: Float[Tensor, "B E N"]


def selective_scan(
    values: Float[Tensor, "B L E"],
    dt: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    initial: Float[Tensor, "B E N"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
    D: Float[Tensor, "E"] | None = None,
) -> Scan:
    """Compute h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] values[t] and outputs[t] = <C[t], h[t]>.

    Accumulates in float32 and returns outputs in the dtype of `values`, the final state in float32
    (float64 in, float64 out). Deterministic, whatever the number of threads.

    Args:
        values: the inputs.
        dt: step sizes, at least 0; softplus is the caller's.
        A: rates, at most 0.
        B: the input map of each token, shared by all channels.
        C: the output map of each token, shared by all channels.
        initial: h[-1], zero if not given.
        documents: document of each token, nondecreasing along the length. Document 0 continues the
            initial state; where the id changes, the state is reset to zero before the token.
        D: skip factor per channel; D values[t] is added to the outputs if given.

    Raises:
        ValueError: the shapes differ, or the length is 0.
    """
    _check_shapes(values, dt, A, B, C, initial, documents, D)
    if path_of(values) is Path.REFERENCE:
        return selective_scan_reference(values, dt, A, B, C, initial, documents, D)
    on_triton = path_of(values) is Path.TRITON
    # The Triton kernels read any dtype; the compiled ones float32 alone.
    x, B, C = (x if on_triton else x.float() for x in (values, B, C))
    tensors = [x.contiguous() for x in (x, dt.float(), A.float(), B, C)]
    start = None if initial is None else initial.float().contiguous()
    ids = None if documents is None else documents.int().contiguous()
    skip = None if D is None or on_triton else D.float().contiguous()
    # Without gradients no states are kept, whatever the length.
    if torch.is_grad_enabled() and any(
        x.requires_grad for x in (*tensors, start, skip) if x is not None
    ):
        chunk = TRITON_CHUNK if on_triton else CHUNK
        outputs, final = _SelectiveScan.apply(*tensors, start, ids, chunk, skip)
    else:
        outputs, final, _ = _forward(*tensors, start, ids, 0, skip)
    if D is not None and on_triton:
        outputs = torch.addcmul(outputs, D, values)
    return Scan(outputs.to(values.dtype), final)


def selective_scan_reference(
    values: Float[Tensor, "B L E"],
    dt: Float[Tensor, "B L E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    initial: Float[Tensor, "B E N"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
    D: Float[Tensor, "E"] | None = None,
) -> Scan:
    """Compute `selective_scan` token by token in plain torch, in float32 or wider."""
    accumulator = torch.promote_types(values.dtype, torch.float32)
    x, dt, A, B, C = (tensor.to(accumulator) for tensor in (values, dt, A, B, C))
    state = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial.to(accumulator)
    outputs = []
    for t in range(x.shape[1]):
        if documents is not None:
            before = documents[:, t - 1] if t else torch.zeros_like(documents[:, 0])
            state = torch.where((documents[:, t] == before)[:, None, None], state, 0.0)
        # Zero-order hold for A but Euler's rule for B, as in the authors' release; the paper's
        # equation 4 has zero-order hold for both.
        decay = torch.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    mixed = torch.stack(outputs, dim=1)
    mixed = mixed if D is None else torch.addcmul(mixed, D.to(accumulator), x)
    return Scan(mixed.to(values.dtype), state)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Float[Tensor, "B L E"],
        dt: Float32[Tensor, "B L E"],
        A: Float32[Tensor, "E N"],
        B: Float[Tensor, "B L N"],
        C: Float[Tensor, "B L N"],
        initial: Float32[Tensor, "B E N"] | None,
        documents: Int[Tensor, "B L"] | None,
        chunk: int,
        D: Float32[Tensor, "E"] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.chunk = chunk  # pyright: ignore[reportAttributeAccessIssue]
        outputs, final, checkpoints = _forward(values, dt, A, B, C, initial, documents, chunk, D)
        # save_for_backward accepts None, but its stub does not.
        saved = (values, dt, A, B, C, documents, checkpoints, D)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        # A final state that nothing uses then has gradient None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return outputs, final

    @staticmethod
    @differentiated_once("selective_scan")
    def backward(
        ctx: BackwardCFunction, d_outputs: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        values, dt, A, B, C, documents, checkpoints, D = list(ctx.saved_tensors)
        chunk: int = ctx.chunk  # pyright: ignore[reportAttributeAccessIssue]
        d_outputs = torch.zeros_like(values) if d_outputs is None else d_outputs.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        gradients = _backward(
            d_outputs, d_final, values, dt, A, B, C, documents, checkpoints, chunk, D
        )
        d_initial = gradients[5] if list(ctx.needs_input_grad)[5] else None
        return *gradients[:5], d_initial, None, None, None if D is None else gradients[6]


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
    batch, L, E = values.shape
    N = A.shape[-1]
    expected = {
        "dt": (dt, (batch, L, E)),
        "A": (A, (E, N)),
        "B": (B, (batch, L, N)),
        "C": (C, (batch, L, N)),
        "initial": (initial, (batch, E, N)),
        "documents": (documents, (batch, L)),
        "D": (D, (E,)),
    }
    if L == 0:
        raise ValueError("selective_scan was given no tokens; the length must be at least 1")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"selective_scan {name} has shape {tuple(tensor.shape)}, but values of shape "
                f"{tuple(values.shape)} and a state of {N} need {shape}"
            )


def _forward_shapes(
    values: Tensor,
    _dt: Tensor,
    A: Tensor,
    _B: Tensor,
    _C: Tensor,
    _initial: Tensor | None,
    _documents: Tensor | None,
    chunk: int,
    _D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, L, E = values.shape
    N = A.shape[1]
    checkpoints = A.new_empty(batch, -(-L // chunk) if chunk else 0, N, E)
    return torch.empty_like(values), A.new_empty(batch, E, N), checkpoints


def _backward_shapes(
    _d_outputs: Tensor,
    _d_final: Tensor | None,
    values: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    _documents: Tensor | None,
    _checkpoints: Tensor,
    _chunk: int,
    D: Tensor | None = None,
) -> tuple[Tensor, ...]:
    d_initial, d_D = A.new_empty(values.shape[0], *A.shape), A.new_empty(0 if D is None else len(D))
    return (*(torch.empty_like(x) for x in (values, dt, A, B, C)), d_initial, d_D)


_forward = define_operator(
    "selective_scan_forward(Tensor values, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? initial, Tensor? documents, int chunk, Tensor? D=None) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_shapes,
    "kernels.scans.selective_scan_triton:forward",
)
_backward = define_operator(
    "selective_scan_backward(Tensor d_outputs, Tensor? d_final, Tensor values, Tensor dt, "
    "Tensor A, Tensor B, Tensor C, Tensor? documents, Tensor checkpoints, int chunk, "
    "Tensor? D=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
    "kernels.scans.selective_scan_triton:backward",
)
