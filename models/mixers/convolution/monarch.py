"""The sequence mixer of Monarch Mixer, M2 (Fu et al. 2023, section 4.2): Hyena of order 2.

Steps, initial values and the bidirectional filter follow the authors' release. Its Monarch matrices
are those of the DFT; filter, gates and dense maps are learned. The activation in the paper's
listing is not in the release, and not here. Changed: convolutions stay within documents and skip
padding; a document longer than the filter is an error; of the filter network, weight decay applies
to the dense maps only; decoding is exact, in O(log^2 T) per token.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.filters import FilterConfig, ImplicitFilter, fft_flops
from models.parts.layers import Linear
from models.parts.short_convs import ShortConv
from models.sequences.continued import Memory
from models.sequences.positions import PADDING
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class MonarchConfig(FilterConfig, MixerConfig):
    """Sizes of an M2 mixer.

    Attributes:
        d_conv: taps of the short convolution, causal in both patterns as in the release.
        residual: whether to add the mixer's input, convolved with another filter, to the gated
            outputs, as M2-BERT does.
    """

    kind: ClassVar[str] = "monarch"
    d_conv: int = 3
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_conv < 1:
            raise ValueError(f"d_conv {self.d_conv} is not positive; take 1 or more")


class Coefficients(NamedTuple):
    """The gates before and after the long convolution, and the convolved residual."""

    before: Float[Tensor, "B L D"]
    after: Float[Tensor, "B L D"]
    residual: Float[Tensor, "B L D"] | None


@register(MonarchConfig)
class Monarch(Mixer):
    """M = diag(after) (T(filter) + beta) diag(before) for each channel, T a Toeplitz matrix.

    The residual convolution reads the input, not the values: `project` computes it and `merge` adds
    it. So `mix` stays linear, and `materialize` returns the gated path only.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF})
    sharded = patterns
    uses_fft = True

    def __init__(self, config: MonarchConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, D = config, slot.d_model
        directions = 1 if slot.causal else 2
        self.in_proj = Linear(D, 3 * D, bias=True)
        self.conv = ShortConv(3 * D, config.d_conv)
        self.filter = ImplicitFilter(config, D, directions)
        self.residual_filter = ImplicitFilter(config, D, directions) if config.residual else None
        self.out_proj = Linear(D, D, bias=True, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L D 1"], Coefficients]:
        """Values are channels, one per head; computes the residual convolution as well."""
        del memory
        self._refuse_longer_documents(sequence)
        after, before, values = self.conv(self.in_proj(x), sequence).chunk(3, dim=-1)
        residual = None
        if self.residual_filter is not None:
            residual = self._convolve(x, self.residual_filter, sequence).to(values.dtype)
        return values.unsqueeze(-1), Coefficients(before, after, residual)

    def mix(
        self,
        values: Float[Tensor, "B L D P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L D P"]:
        """Gate, convolve and gate; P > 1 applies each channel's matrix to several values."""
        gated = coefficients.before.unsqueeze(-1) * values
        mixed = self._convolve(gated.flatten(2), self.filter, sequence)
        return coefficients.after.unsqueeze(-1) * mixed.view(values.shape)

    def merge(
        self, mixed: Float[Tensor, "B L D 1"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Add the residual and project out."""
        outputs = mixed.squeeze(-1)
        if coefficients.residual is not None:
            outputs = outputs + coefficients.residual
        return self.out_proj(outputs)

    def filter_norm(self) -> float:
        """The largest 1-norm of a channel's filters, the residual one included."""
        norms = self.filter.norm()
        if self.residual_filter is not None:
            norms = norms + self.residual_filter.norm()
        return norms.max().item()

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """FFTs and the filter network, once per sequence; two gates pointwise.

        Decoding, amortised: a block of n tokens for each power of two up to the tokens seen costs
        an FFT and a filter of 2 n taps, once every 2 n tokens.
        """
        filters = [f for f in (self.filter, self.residual_filter) if f is not None]
        if queries == keys:
            needed = sum(f.flops(keys) + len(f.skip) * fft_flops(keys) for f in filters)
        else:
            sizes = [1 << n for n in range(keys.bit_length())]
            tiles = [f.flops(2 * n) + len(f.skip) * fft_flops(n) for f in filters for n in sizes]
            shares = [1 / (2 * n) for _ in filters for n in sizes]
            needed = queries * sum(x * y for x, y in zip(tiles, shares, strict=True))
        return MixFlops(needed, needed, 2.0 * queries * len(self.filter.skip))

    def _convolve(
        self, x: Float[Tensor, "B L E"], filter: ImplicitFilter, sequence: WholeSequence
    ) -> Float[Tensor, "B L E"]:
        """Convolve the filter's channels, each possibly repeated several times in a row."""
        several = x.shape[-1] // len(filter.skip)

        def taps(length: int, direction: int = 0) -> Tensor:
            return filter(length, direction).repeat_interleave(several, dim=0)

        if self.slot.causal:
            return sequence.convolve(x, taps)
        return sequence.convolve(x, taps, lambda length: taps(length, 1))

    def _refuse_longer_documents(self, sequence: WholeSequence) -> None:
        limit, longest = self.config.max_len, sequence.gathered_documents().shape[1]
        if sequence.packed and longest > limit:
            places = sequence.positions().masked_fill(sequence.documents == PADDING, -1)
            longest = int(places.max()) + 1
        if longest > limit:
            raise ValueError(
                f"{self.config.kind} got a document of {longest} tokens, but its filter has "
                f"max_len {limit} taps; take a larger max_len or shorter documents"
            )
