"""Long convolutions within documents, causal or bidirectional, by FFT.

Each document is zero-padded so that the circular convolution does not wrap around, and convolved in
float32. Short documents are convolved directly, which is faster and strictly causal. Source: Fu et
al. 2023, "Monarch Mixer", and its release for the bidirectional form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.convolution.causal_conv import causal_conv
from kernels.derivatives import differentiated_once, in_plain_torch
from kernels.dispatch import Path, path_of
from kernels.precision import without_autocast

# Up to this length the compiled direct convolution is faster than the FFT, forward and backward.
DIRECT = 64
# Points transformed at a time: enough to use all cores, and few enough to bound the memory of the
# spectra to some tens of megabytes at any width.
POINTS = 1 << 20


def long_conv(
    values: Float[Tensor, "B L E"],
    filter: Float[Tensor, "E K"],
    documents: Int[Tensor, "B L"] | None = None,
    reverse_filter: Float[Tensor, "E R"] | None = None,
) -> Float[Tensor, "B L E"]:
    """Compute outputs[t] = sum of filter[:, t - s] * values[s] over the s <= t, by channel.

    Accumulates in float32 and returns the dtype of `values`; float64 goes to the reference, which
    is strictly causal. With the FFT later tokens leak into rounding: about 1e-7 of the largest of
    them times the filter's 1-norm.

    Args:
        values: the inputs.
        filter: taps from lag 0 on; taps beyond its length are zero.
        documents: document of each token; documents do not mix.
        reverse_filter: taps of the tokens s > t, from s = t + 1 on.

    Raises:
        ValueError: the channels or the documents do not fit the values, or there are no tokens.
    """
    _check_shapes(values, filter, documents, reverse_filter)
    if values.dtype is torch.float64 or in_plain_torch():
        return long_conv_reference(values, filter, documents, reverse_filter)
    L = values.shape[1]
    taps = filter[:, :L].float()
    reverse = None if reverse_filter is None else reverse_filter[:, : L - 1].float()
    # The FFT takes no batch of no rows.
    if (L <= DIRECT or not len(values)) and path_of(values) is Path.NATIVE:
        return _sum_directly(values, taps, reverse, documents)
    if documents is not None and not documents.is_meta:
        return _convolve_documents(values, taps, reverse, documents)
    return _LongConv.apply(values, taps, reverse).to(values.dtype)


def long_conv_reference(
    values: Float[Tensor, "B L E"],
    filter: Float[Tensor, "E K"],
    documents: Int[Tensor, "B L"] | None = None,
    reverse_filter: Float[Tensor, "E R"] | None = None,
) -> Float[Tensor, "B L E"]:
    """Compute `long_conv` by a dense Toeplitz matrix for each document, in float32 or wider."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if reverse_filter is None:
        reverse_filter = filter[:, :0]
    rows = []
    for row in range(values.shape[0]):
        parts = [values.shape[1]]
        if documents is not None:
            parts = torch.unique_consecutive(documents[row], return_counts=True)[1].tolist()
        mixed = [
            torch.einsum("ets,se->te", toeplitz(filter, reverse_filter, len(part)).to(part), part)
            for part in wide[row].split(parts)
        ]
        rows.append(torch.cat(mixed))
    return torch.stack(rows).to(values.dtype)


def toeplitz(
    filter: Float[Tensor, "E K"], reverse_filter: Float[Tensor, "E R"], length: int
) -> Float[Tensor, "E L L"]:
    """The matrix of a convolution: filter[t - s] at and below the diagonal, reverse above it."""
    R, K = reverse_filter.shape[1], filter.shape[1]
    place = torch.arange(length, device=filter.device)
    at = place[:, None] - place[None, :] + R
    table = torch.cat([reverse_filter.flip(1), filter], dim=1)
    entries = table[:, at.clamp(0, R + K - 1)]
    return entries.masked_fill((at < 0) | (at >= R + K), 0.0)


def fast_size(points: int) -> int:
    """The smallest even FFT length >= `points` of the form 2^n times 1, 3, 5, 9 or 15."""
    odd = (1, 3, 5, 9, 15)
    return min(m << max(1, (-(-points // m) - 1).bit_length()) for m in odd)


def _sum_directly(
    values: Tensor, taps: Tensor, reverse: Tensor | None, documents: Tensor | None
) -> Tensor:
    nothing = taps.new_zeros(taps.shape[0])
    wide = values.float()
    outputs = causal_conv(wide, taps.flip(1), nothing, None, documents).outputs
    if reverse is not None:
        # The same on the reversed sequence, with a tap of 0 at lag 0, which `filter` covers.
        reversed_ids = None if documents is None else documents.flip(1)
        later = F.pad(reverse, (1, 0)).flip(1)
        added = causal_conv(wide.flip(1), later, nothing, None, reversed_ids).outputs
        outputs = outputs + added.flip(1)
    return outputs.to(values.dtype)


def _convolve_documents(
    values: Tensor, taps: Tensor, reverse: Tensor | None, documents: Tensor
) -> Tensor:
    """Convolve each document as a separate row, batching documents of similar length."""
    layout = _layout(documents)
    slots = _gather_rows(values.flatten(0, 1), layout.tokens, layout.slots)
    outputs, begin = [], 0
    for size, count in layout.sizes:
        rows = slots[begin : begin + size * count].view(count, size, -1)
        begin += size * count
        outputs.append(long_conv(rows, taps, None, reverse).flatten(0, 1))
    return _gather_rows(torch.cat(outputs), layout.slots, layout.tokens).view(values.shape)


class _Layout(NamedTuple):
    """The layout of a batch with one document per row, rows sorted by length.

    Attributes:
        slots: index of each token in the layout.
        tokens: token at each index of the layout; -1 in padding.
        sizes: length and number of rows of each length, in order.
    """

    slots: Int[Tensor, "T"]
    tokens: Int[Tensor, "S"]
    sizes: list[tuple[int, int]]


def _layout(documents: Int[Tensor, "B L"]) -> _Layout:
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = first.flatten()
    begins = first.nonzero().squeeze(1)
    ends = torch.cat([begins[1:], begins.new_tensor([first.numel()])])
    # Lengths are rounded up to 2^n or 3 * 2^(n-1), at least 8: few distinct ones, with at most half
    # as much padding as tokens.
    double = torch.exp2(torch.log2((ends - begins).double()).ceil()).long().clamp(min=8)
    lengths = torch.where(4 * (ends - begins) <= 3 * double, 3 * double // 4, double)
    order = torch.argsort(lengths, stable=True)
    places = torch.empty_like(begins)
    places[order] = lengths[order].cumsum(0) - lengths[order]
    number = first.long().cumsum(0) - 1
    token = torch.arange(first.numel(), device=documents.device)
    slots = places[number] + token - begins[number]
    tokens = token.new_full((int(lengths.sum()),), -1)
    tokens[slots] = token
    sizes, counts = torch.unique(lengths, return_counts=True)
    return _Layout(slots, tokens, list(zip(sizes.tolist(), counts.tolist(), strict=True)))


def _gather_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    taken = _GatherRows.apply(rows, index, inverse)
    assert isinstance(taken, Tensor)
    return taken


class _GatherRows(torch.autograd.Function):
    """Gather rows, zeros at -1. With the inverse index the backward pass is a gather too."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Float[Tensor, "S E"],
        index: Int[Tensor, "T"],
        inverse: Int[Tensor, "S"],
    ) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _rows_or_zeros(rows, index)

    @staticmethod
    @differentiated_once("long_conv")
    def backward(ctx: BackwardCFunction, d_taken: Tensor) -> tuple[Tensor | None, ...]:
        _, inverse = list(ctx.saved_tensors)
        return _rows_or_zeros(d_taken.contiguous(), inverse), None, None


def _rows_or_zeros(rows: Tensor, index: Tensor) -> Tensor:
    taken = rows.index_select(0, index.clamp(min=0))
    return taken.masked_fill_((index < 0)[:, None], 0.0)


class _LongConv(torch.autograd.Function):
    """Convolve rows of one document each; the backward pass recomputes spectra."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Float[Tensor, "B L E"],
        taps: Float32[Tensor, "E K"],
        reverse: Float32[Tensor, "E R"] | None,
    ) -> Tensor:
        # save_for_backward accepts None, but its stub does not.
        ctx.save_for_backward(values, taps, reverse)  # pyright: ignore[reportArgumentType]
        L, n = values.shape[1], _points(values, taps, reverse)
        outputs = torch.empty_like(values, dtype=torch.float32)
        with without_autocast(values):
            for part in _parts(values, n):
                spectrum = _spectrum(values[..., part], n)
                spectrum *= torch.fft.rfft(_circle(taps, reverse, part, n))
                outputs[..., part] = torch.fft.irfft(spectrum, n=n)[..., :L].transpose(1, 2)
        return outputs

    @staticmethod
    @differentiated_once("long_conv")
    def backward(ctx: BackwardCFunction, d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, taps, reverse = list(ctx.saved_tensors)
        L, n = values.shape[1], _points(values, taps, reverse)
        d_values = torch.empty_like(values, dtype=torch.float32)
        d_taps = torch.empty_like(taps)
        d_reverse = None if reverse is None else torch.empty_like(reverse)
        with without_autocast(values):
            for part in _parts(values, n):
                incoming = _spectrum(d_outputs[..., part], n)
                # The transpose of a circular convolution: its spectrum is the conjugate.
                product = incoming * torch.fft.rfft(_circle(taps, reverse, part, n)).conj()
                d_values[..., part] = torch.fft.irfft(product, n=n)[..., :L].transpose(1, 2)
                # Summed over rows as spectra: one inverse transform per channel, not per row.
                incoming *= _spectrum(values[..., part], n).conj()
                d_circle = torch.fft.irfft(incoming.sum(0), n=n)
                d_taps[part] = d_circle[:, : taps.shape[1]]
                if d_reverse is not None:
                    d_reverse[part] = d_circle.flip(1)[:, : d_reverse.shape[1]]
        return d_values.to(values.dtype), d_taps, d_reverse


def _points(values: Tensor, taps: Tensor, reverse: Tensor | None) -> int:
    """The FFT length, at which neither direction wraps around."""
    reach = max(taps.shape[1] - 1, 0 if reverse is None else reverse.shape[1])
    return fast_size(values.shape[1] + reach)


def _parts(values: Tensor, n: int) -> list[slice]:
    """Slices of the channels with about POINTS points each."""
    B, _, E = values.shape
    width = max(1, POINTS // (B * n))
    return [slice(begin, min(begin + width, E)) for begin in range(0, E, width)]


def _spectrum(values: Tensor, n: int) -> Tensor:
    B, L, E = values.shape
    padded = values.new_zeros((B, E, n), dtype=torch.float32)
    padded[..., :L] = values.transpose(1, 2)
    return torch.fft.rfft(padded)


def _circle(taps: Tensor, reverse: Tensor | None, part: slice, n: int) -> Tensor:
    """Both filters as one circular filter of n taps: lag -1 is the last."""
    K = taps.shape[1]
    circle = taps.new_zeros(taps[part].shape[0], n)
    circle[:, :K] = taps[part]
    if reverse is not None:
        circle[:, n - reverse.shape[1] :] = reverse[part].flip(1)
    return circle


def _check_shapes(
    values: Tensor, taps: Tensor, documents: Tensor | None, reverse: Tensor | None
) -> None:
    B, L, E = values.shape
    channels = {"filter": taps, "reverse_filter": taps if reverse is None else reverse}
    for name, tensor in channels.items():
        if tensor.shape[0] != E:
            raise ValueError(
                f"long_conv {name} has {tensor.shape[0]} channels, but the values have {E}"
            )
    if L == 0 or taps.shape[1] == 0:
        raise ValueError(
            f"long_conv was given {L} tokens and {taps.shape[1]} taps; both must be at least 1"
        )
    if documents is not None and documents.shape != (B, L):
        raise ValueError(
            f"long_conv documents have shape {tuple(documents.shape)}, but values of shape "
            f"{tuple(values.shape)} need {(B, L)}"
        )
