"""The short causal depthwise convolution before recurrent mixers (Gu and Dao 2023, section 3.4).

Changed: carried inputs, for decoding and sharded sequences, and document boundaries.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import differentiated_once
from kernels.dispatch import Path, define_operator, path_of


class Conv(NamedTuple):
    """The outputs, and the last inputs, which the next tokens need."""

    outputs: Float[Tensor, "B L E"]
    final: Float[Tensor, "B K-1 E"]


def causal_conv(
    values: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, "E"],
    initial: Float[Tensor, "B K-1 E"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Conv:
    """Compute outputs[t] = bias + sum over k of weight[:, k] * values[t - K + 1 + k], by channel.

    Accumulates in float32 and returns the dtype of `values`. Deterministic, whatever the number of
    threads. The final inputs are zero where they belong to another document than the last token,
    because the next call takes them as document 0.

    Args:
        values: the inputs.
        weight: taps, that of the oldest input first, as in torch's convolutions.
        bias: added to each output.
        initial: the inputs of the K - 1 tokens before the first; zero if not given.
        documents: document of each token; each document is contiguous. Inputs of another document
            are not seen; `initial` belongs to document 0.

    Raises:
        ValueError: the shapes differ, or the length is 0.
    """
    check_shapes(values, weight, bias, initial, documents)
    final = _final_inputs(values, weight.shape[1] - 1, initial, documents)
    if path_of(values) is Path.REFERENCE:
        return Conv(causal_conv_reference(values, weight, bias, initial, documents).outputs, final)
    # The Triton kernels read any dtype; the compiled ones float32 alone.
    inputs = values if path_of(values) is Path.TRITON else values.float()
    outputs = _CausalConv.apply(*prepared(inputs, weight, bias, initial, documents))
    return Conv(outputs.to(values.dtype), final)


def causal_conv_reference(
    values: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, "E"],
    initial: Float[Tensor, "B K-1 E"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Conv:
    """Compute `causal_conv` as one shifted product per tap in plain torch, in float32 or wider."""
    batch, L, E = values.shape
    K = weight.shape[1]
    accumulator = torch.promote_types(values.dtype, torch.float32)
    # Carried inputs come first, so tap k reads the slice that starts at k.
    before = values.new_zeros(batch, K - 1, E) if initial is None else initial
    inputs = torch.cat([before, values], dim=1).to(accumulator)
    outputs = bias.to(accumulator).expand(batch, L, E)
    for k in range(K):
        seen = inputs[:, k : k + L]
        if documents is not None:
            ids = torch.cat([documents.new_zeros(batch, K - 1), documents], dim=1)[:, k : k + L]
            seen = torch.where((ids == documents)[:, :, None], seen, 0.0)
        outputs = outputs + weight[:, k].to(accumulator) * seen
    return Conv(outputs.to(values.dtype), _final_inputs(values, K - 1, initial, documents))


def prepared(
    values: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, documents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The operators' arguments, in their dtypes and contiguous."""
    start = None if initial is None else initial.to(values.dtype).contiguous()
    ids = None if documents is None else documents.int().contiguous()
    tensors = (x.contiguous() for x in (values, weight.float(), bias.float()))
    return *tensors, start, ids


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Float[Tensor, "B L E"],
        weight: Float32[Tensor, "E K"],
        bias: Float32[Tensor, "E"],
        initial: Float[Tensor, "B K-1 E"] | None,
        documents: Int[Tensor, "B L"] | None,
    ) -> Tensor:
        # save_for_backward accepts None, but its stub does not.
        saved = (values, weight, initial, documents)
        ctx.save_for_backward(*saved)  # pyright: ignore[reportArgumentType]
        return _forward(values, weight, bias, initial, documents)

    @staticmethod
    @differentiated_once("causal_conv")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, initial, documents = list(ctx.saved_tensors)
        d_values, d_weight, d_bias, d_initial = _backward(
            d_outputs.contiguous(), values, weight, initial, documents
        )
        return d_values, d_weight, d_bias, None if initial is None else d_initial, None


def _final_inputs(
    values: Tensor, count: int, initial: Tensor | None, documents: Tensor | None
) -> Tensor:
    batch, L, E = values.shape
    if count > L:
        before = values.new_zeros(batch, count, E) if initial is None else initial.to(values.dtype)
        values = torch.cat([before, values], dim=1)
    # A copy: a view would keep the whole sequence alive in a decoding state.
    final = values[:, values.shape[1] - count :].clone()
    if documents is None:
        return final
    # Carried inputs belong to document 0; those of another document must not reach the next call.
    ids = torch.cat([documents.new_zeros(batch, count), documents], dim=1)[:, L:]
    return torch.where((ids == documents[:, -1:])[:, :, None], final, 0.0)


def check_shapes(
    values: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> None:
    """Check that shapes match."""
    batch, L, E = values.shape
    K = weight.shape[-1]
    expected = {
        "weight": (weight, (E, K)),
        "bias": (bias, (E,)),
        "initial": (initial, (batch, K - 1, E)),
        "documents": (documents, (batch, L)),
    }
    if L == 0 or K == 0:
        raise ValueError(f"causal_conv was given {L} tokens and {K} taps; both must be at least 1")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"causal_conv {name} has shape {tuple(tensor.shape)}, but values of shape "
                f"{tuple(values.shape)} and {K} taps need {shape}"
            )


def _forward_shapes(
    values: Tensor,
    _weight: Tensor,
    _bias: Tensor,
    _initial: Tensor | None,
    _documents: Tensor | None,
) -> Tensor:
    return torch.empty_like(values)


def gradient_shapes(
    _d_outputs: object,
    values: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    _documents: Tensor | None,
) -> tuple[Tensor, ...]:
    """Empty tensors like the gradients of values, weight, bias and initial inputs."""
    E, K = weight.shape
    d_initial = values.new_empty(0 if initial is None else values.shape[0], K - 1, E)
    return torch.empty_like(values), torch.empty_like(weight), weight.new_empty(E), d_initial


_forward = define_operator(
    "causal_conv_forward(Tensor values, Tensor weight, Tensor bias, Tensor? initial, "
    "Tensor? documents) -> Tensor",
    _forward_shapes,
    "kernels.convolution.causal_conv_triton:forward",
)
_backward = define_operator(
    "causal_conv_backward(Tensor d_outputs, Tensor values, Tensor weight, Tensor? initial, "
    "Tensor? documents) -> (Tensor, Tensor, Tensor, Tensor)",
    gradient_shapes,
    "kernels.convolution.causal_conv_triton:backward",
)
