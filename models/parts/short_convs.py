"""Short depthwise convolutions along the sequence, before recurrent and structured mixers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.convolution.causal_conv import causal_conv
from kernels.convolution.silu_conv import silu_conv
from models.parts.layers import uniform
from models.sequences.whole import WholeSequence


class ShortConv(nn.Module):
    """A causal depthwise convolution over the last few tokens of each document.

    Args:
        channels: width.
        width: taps.
        std: standard deviation of the initial taps, with a bias of zeros; None draws both as
            torch's Conv1d does, from U(-1/sqrt(width), 1/sqrt(width)).
    """

    def __init__(self, channels: int, width: int, *, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self._std = std

    def forward(self, x: Float[Tensor, "B L E"], sequence: WholeSequence) -> Float[Tensor, "B L E"]:
        """Convolve each channel."""
        return causal_conv(x, self.weight, self.bias, *self._around(x, sequence)).outputs

    def silu_in_parts(
        self, x: Float[Tensor, "B L E"], sequence: WholeSequence, sizes: Sequence[int]
    ) -> tuple[Float[Tensor, "B L E_i"], ...]:
        """Convolve, apply SiLU, and split the channels into parts of the given sizes."""
        return silu_conv(x, self.weight, self.bias, sizes, *self._around(x, sequence))

    def _around(self, x: Tensor, sequence: WholeSequence) -> tuple[Tensor | None, Tensor | None]:
        documents = sequence.packed_documents
        return sequence.halo(x, self.weight.shape[1] - 1), documents

    def token_flops(self) -> int:
        """Forward FLOPs for each token."""
        return 2 * self.weight.numel()

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial taps and bias."""
        shape = getattr(self, name).shape
        if self._std is None:
            return uniform(shape, self.weight.shape[1] ** -0.5, generator)
        if name == "bias":
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * self._std


class CentredConv(nn.Module):
    """A centred depthwise convolution, within documents.

    Args:
        channels: width.
        width: taps, an odd number.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"d_conv {width} has no central tap; take an odd number")
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Float[Tensor, "B L E"], sequence: WholeSequence) -> Float[Tensor, "B L E"]:
        """Convolve each channel: tap k reads the token at offset k - (width - 1) / 2."""
        half, weight, bias = self.weight.shape[1] // 2, self.weight, self.bias
        if not sequence.packed:
            before, ahead = self._ahead(x, sequence)
            return causal_conv(ahead, weight, bias, before).outputs
        around = sequence.around(x, half, half)
        # The causal kernel masks other documents on its left only. So the taps are split: those up
        # to the own token run forward, the later ones run on the reversed sequence.
        ids = sequence.documents_around(half, half)
        later = torch.cat([weight[:, half + 1 :].flip(1), torch.zeros_like(weight[:, :1])], dim=1)
        behind = causal_conv(around, weight[:, : half + 1], bias, documents=ids)
        ahead = causal_conv(
            around.flip(1), later, torch.zeros_like(bias), documents=ids.flip(1).contiguous()
        )
        mixed = behind.outputs + ahead.outputs.flip(1)
        return mixed[:, half : half + x.shape[1]].contiguous()

    def silu_in_parts(
        self, x: Float[Tensor, "B L E"], sequence: WholeSequence, sizes: Sequence[int]
    ) -> tuple[Float[Tensor, "B L E_i"], ...]:
        """Convolve, apply SiLU, and split the channels into parts of the given sizes."""
        if sequence.packed:
            return F.silu(self(x, sequence)).split(list(sizes), dim=-1)
        before, ahead = self._ahead(x, sequence)
        return silu_conv(ahead, self.weight, self.bias, sizes, before)

    def _ahead(self, x: Tensor, sequence: WholeSequence) -> tuple[Tensor, ...]:
        """Inputs that make the centred convolution causal: carried ones, then shifted ones."""
        half = self.weight.shape[1] // 2
        return sequence.around(x, half, half).split([2 * half, x.shape[1]], dim=1)

    def token_flops(self) -> int:
        """Forward FLOPs for each token."""
        return 2 * self.weight.numel()

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values as in torch's Conv1d: U(-1/sqrt(width), 1/sqrt(width))."""
        shape = getattr(self, name).shape
        return uniform(shape, self.weight.shape[1] ** -0.5, generator)
