"""A Toeplitz matrix: one tap per distance (Hydra paper, table 1).

Changed: entry (i, j) is forward tap i - j on and below the diagonal and reverse tap j - i above it,
as the paper states. The release is off by one: it uses tap i - j + 1, and the corner wraps around.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.precision import widened, without_autocast
from models.bases.structured_matrix import EntrywiseMixer, Features, StructuredConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.parts.layers import uniform
from models.sequences.documents import by_document
from models.sequences.whole import WholeSequence

Taps = Float[Tensor, "B S R H"] | None
"""Forward and reverse taps of each token; only forward ones in a causal pattern."""


@dataclass(frozen=True)
class ToeplitzConfig(StructuredConfig):
    """A Toeplitz matrix."""

    kind: ClassVar[str] = "toeplitz"


@register(ToeplitzConfig)
class Toeplitz(EntrywiseMixer):
    """m[i, j] = f[i - j] for i >= j, r[j - i] for i < j; token k of a document gives f[k], r[k].

    Bidirectional: a float32 FFT per document. Causal: materialised, because taps come from tokens,
    and the rounding of an FFT would leak later tokens through both of its inputs.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: ToeplitzConfig, slot: Slot) -> None:
        H, aligned = config.n_heads, config.sequence_aligned
        taps = (1 if slot.causal else 2) * H
        super().__init__(config, slot, convolved=taps * aligned, gain=0.5)
        if not aligned:
            longest = config.longest
            self.taps = nn.Parameter(torch.empty(H, longest if slot.causal else 2 * longest - 1))

    def structure(self, features: Features, sequence: WholeSequence) -> Taps:
        """Taps from the tokens' channels; None if they are learned."""
        if not self.config.sequence_aligned:
            return None
        taps = F.silu(features.convolved)
        return sequence.gather(taps.unflatten(2, (-1, self.config.n_heads)))

    def multiply(
        self, values: Float[Tensor, "B S H P"], structure: Taps, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Convolve each document, or multiply by the matrix in a causal pattern."""
        if self.slot.causal:
            return super().multiply(values, structure, sequence)
        with without_autocast(values):
            if structure is None:
                return by_document((widened(values),), sequence, self._convolve_learned)
            return by_document((widened(values), widened(structure)), sequence, _convolve)

    def entries(self, structure: Taps, sequence: WholeSequence) -> Float[Tensor, "#B H L S"]:
        """The tap of each distance; entries above the diagonal are arbitrary."""
        places = self.key_places(sequence) if sequence.packed else self.key_places(sequence)[:1]
        L, S = sequence.documents.shape[1], places.shape[1]
        if structure is None:
            taps = widened(self.taps)[None]
            rows = self.places(sequence) if sequence.packed else places[:, S - L :]
        else:
            taps = widened(structure[:, :, 0]).transpose(1, 2)
            # Tap k of a document is that of its token k, so rows index tokens, not positions.
            rows = torch.arange(S - L, S, device=places.device)[None]
        return _pick(taps, (rows[:, :, None] - places[:, None, :]).clamp(min=0))

    def entry_flops(self, queries: int, keys: int) -> MixFlops:
        """None."""
        del queries, keys
        return MixFlops()

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Causal: two per channel and pair; else 2.5 n log2(n) per FFT, 6 per complex product."""
        if self.slot.causal:
            return super().multiply_flops(queries, keys)
        n, E, H = fft_size(keys), self.inner_width, self.config.n_heads
        transform = 2.5 * n * math.log2(n)
        flops = (2 * E + H) * transform + 6.0 * E * (n // 2 + 1)
        return MixFlops(flops, flops)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial taps as in the release, for both directions."""
        fans = self.config.n_heads + 2 * self.config.longest - 1
        return uniform(self.taps.shape, math.sqrt(6 / fans), generator)

    def _convolve_learned(self, values: Float[Tensor, "N T H P"]) -> Float[Tensor, "N T H P"]:
        T, middle = values.shape[1], self.config.longest - 1
        lags = widened(self.taps).t()
        forward, reverse = lags[middle : middle + T], lags[middle - T + 1 : middle + 1].flip(0)
        return _convolve(values, torch.stack([forward, reverse], dim=1)[None])


def fft_size(tokens: int) -> int:
    """The smallest power of two at which a document's convolution does not wrap around."""
    return 1 << (2 * tokens - 2).bit_length()


def _convolve(
    values: Float[Tensor, "N T H P"], taps: Float[Tensor, "#N T 2 H"]
) -> Float[Tensor, "N T H P"]:
    T = values.shape[1]
    n = fft_size(T)
    forward, reverse = taps.unbind(2)
    between = forward.new_zeros(forward.shape[0], n - 2 * T + 1, forward.shape[2])
    # One circular filter: forward taps from lag 0, zeros, and reverse taps up to lag -1 at the end.
    kernel = torch.cat([forward, between, reverse[:, 1:].flip(1)], dim=1)
    spectrum = torch.fft.rfft(kernel, dim=1)[..., None] * torch.fft.rfft(values, n=n, dim=1)
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, :T]


def _pick(taps: Float[Tensor, "C H T"], index: Int[Tensor, "R L S"]) -> Float[Tensor, "B H L S"]:
    B, H, (L, S) = max(taps.shape[0], index.shape[0]), taps.shape[1], index.shape[1:]
    spread = taps[:, :, None, :].expand(B, H, L, -1)
    return spread.gather(-1, index[:, None].expand(B, H, L, S))
