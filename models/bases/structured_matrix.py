"""The common block of Hydra's ablation of matrix mixers: only the matrix differs between kinds.

Source: Hwang et al. 2024, "Hydra: Bidirectional State Space Models Through Generalized Matrix
Mixers", sections 2 and 4.1, and the authors' release. Changed:

- The release divides outputs by the square root of the training length. Here a token's output is
  divided by the square root of the number of tokens it may see: the length of its document or, in a
  causal pattern, its position plus one. So scales do not depend on a training length, and not on
  the other documents of a row.
- What is learned per position (forms that are not sequence aligned) is indexed by the position in
  the document; a shorter document uses the leading part of the longest one's matrix.
- In a causal pattern the short convolution is causal instead of centred.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.precision import widened, without_autocast
from kernels.rowwise.swiglu import silu_gated
from models.mixer import Mixer, MixerConfig, MixFlops, Slot, mixer_kinds
from models.parts.layers import Linear, RMSNorm
from models.parts.short_convs import CentredConv, ShortConv
from models.sequences.continued import Memory
from models.sequences.positions import PADDING, positions_in_documents
from models.sequences.whole import WholeSequence

Structure: TypeAlias = Any
"""What determines a matrix; its type is private to the mixer."""


@dataclass(frozen=True)
class StructuredConfig(MixerConfig):
    """Sizes that all matrices have.

    Attributes:
        n_heads: number of matrices; each mixes an equal part of the channels.
        max_len: longest document; None for no limit, which only sequence-aligned matrices allow.
        sequence_aligned: whether the matrix parameters of a position are computed from its token
            (Hydra paper, definition 2.2) instead of learned per position.
        d_conv: width of the short convolution; None for 7, or 4 in a causal pattern.
        expand: inner width over d_model.
    """

    n_heads: int
    max_len: int | None = None
    sequence_aligned: bool = True
    d_conv: int | None = None
    expand: int = 2

    def __post_init__(self) -> None:
        for name in ("n_heads", "max_len", "d_conv", "expand", "d_qk"):
            size = getattr(self, name, None)
            if size is not None and size < 1:
                raise ValueError(f"{name} {size} is not positive; take 1 or more")
        if not self.sequence_aligned and self.max_len is None:
            raise ValueError(
                f"{self.kind} with sequence_aligned false has parameters per position, but max_len "
                "is not given; set it to the length of the longest document"
            )

    @property
    def longest(self) -> int:
        """The longest document, where the form has one."""
        assert self.max_len is not None, "checked when the config was made"
        return self.max_len


@dataclass(frozen=True)
class UnalignedConfig(StructuredConfig):
    """A matrix that has no sequence-aligned form: all of it is learned."""

    max_len: int = field()
    sequence_aligned: bool = False

    def __post_init__(self) -> None:
        if self.sequence_aligned:
            able = (kind for kind, config in mixer_kinds().items() if _can_align(config))
            raise ValueError(
                f"{self.kind} has no sequence-aligned form, but sequence_aligned is true; set it "
                f"to false or choose from {', '.join(able)}"
            )
        super().__post_init__()


class Features(NamedTuple):
    """Projected features of each token: the values, and channels for the matrix parameters.

    Attributes:
        convolved: channels after the short convolution.
        plain: channels without it.
    """

    values: Float[Tensor, "B L E"]
    convolved: Float[Tensor, "B L X"]
    plain: Float[Tensor, "B L Y"]


class Coefficients(NamedTuple):
    """What determines the matrix, and the gate of its output."""

    structure: Structure
    gate: Float[Tensor, "B L E"]


class StructuredMixer(Mixer):
    """out(norm((M + 1) values) * silu(gate)) with convolved values; subclasses define M.

    Args:
        config: sizes.
        slot: its place in the backbone.
        convolved: convolved channels that the subclass needs besides the values.
        plain: channels without convolution that the subclass needs.
        gain: factor on M besides 1 / sqrt(tokens seen); None for an unscaled M.

    Attributes:
        residual: whether the identity is added to M.
        remembers: whether decoding keeps the values of all tokens.
    """

    residual: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    def __init__(
        self,
        config: StructuredConfig,
        slot: Slot,
        *,
        convolved: int = 0,
        plain: int = 0,
        gain: float | None = None,
    ) -> None:
        super().__init__(slot)
        E, H = config.expand * slot.d_model, config.n_heads
        if E % H:
            raise ValueError(
                f"mixer.n_heads {H} does not divide an inner width of {E} (expand {config.expand} "
                f"times d_model {slot.d_model}); choose a divisor"
            )
        self.config, self.gain = config, gain
        self._widths = [E, convolved, plain]
        self.in_proj = Linear(slot.d_model, 2 * E + convolved + plain)
        width = config.d_conv or (4 if slot.causal else 7)
        conv = ShortConv if slot.causal else CentredConv
        self.conv = conv(E + convolved, width)
        self.norm = RMSNorm(E)
        self.out_proj = Linear(E, slot.d_model, scale=slot.residual_scale)

    @abc.abstractmethod
    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Compute what determines the matrix."""

    @abc.abstractmethod
    def multiply(
        self, values: Float[Tensor, "B S H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply the unscaled M."""

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S H P"], Coefficients]:
        """Values are convolved channels; `structure` computes what determines the matrix."""
        del memory
        self._check_lengths(sequence)
        E, convolved, plain = self._widths
        gate, inner, plain = self.in_proj.in_parts(x, [E, E + convolved, plain])
        values, extra = self.conv(inner, sequence).split([E, convolved], dim=-1)
        values = F.silu(values)
        structure = self.structure(Features(values, extra, plain), sequence)
        heads = values.unflatten(2, (self.config.n_heads, -1))
        # Only a matrix of entries needs the values of all tokens; a scan keeps a state instead.
        heads = sequence.gather(heads) if self.remembers else heads
        return heads, Coefficients(structure, gate)

    def mix(
        self, values: Float[Tensor, "B S H P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply M, scaled, and the identity."""
        mixed = self.multiply(values, coefficients.structure, sequence)
        if self.gain is not None:
            seen = self._seen(sequence).to(widened(mixed).dtype)
            mixed = mixed * (self.gain * seen.rsqrt())[:, :, None, None]
        if self.residual:
            # In a later chunk values hold all tokens so far, outputs only the last ones.
            mixed = mixed + values[:, -mixed.shape[1] :]
        return mixed.to(values.dtype)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Normalise, gate and project out."""
        return self.out_proj(silu_gated(self.norm(mixed.flatten(2)), coefficients.gate))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """`multiply`, and 2 per output for the scale and the identity."""
        work = self.multiply_flops(queries, keys)
        each = (self.gain is not None) + self.residual
        return MixFlops(
            work.needed, work.full_square, work.elementwise + each * self.inner_width * queries
        )

    @abc.abstractmethod
    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Count one `multiply`, including the entries of a materialised matrix."""

    @property
    def inner_width(self) -> int:
        """Value channels of all heads."""
        return self._widths[0]

    def pairs(self, queries: int, keys: int) -> float:
        """Nonzero entries of one head's matrix."""
        if not self.slot.causal:
            return float(queries * keys)
        # Every query sees the earlier keys, and of the queries' own those up to itself.
        return queries * (keys - queries) + queries * (queries + 1) / 2

    def places(self, sequence: WholeSequence) -> Int[Tensor, "B L"]:
        """The position of each token in its document, 0 in padding."""
        return sequence.positions().masked_fill(sequence.documents == PADDING, 0)

    def key_places(self, sequence: WholeSequence) -> Int[Tensor, "B S"]:
        """The position of each token that `gather` returns, 0 in padding."""
        ids = sequence.gathered_documents()
        return sequence.memo(
            ("structured", "key places"),
            lambda: positions_in_documents(ids).masked_fill(ids == PADDING, 0),
        )

    def _seen(self, sequence: WholeSequence) -> Int[Tensor, "B L"]:
        if self.slot.causal:
            return sequence.positions() + 1
        return sequence.memo(("structured", "lengths"), lambda: _lengths(sequence))

    def _check_lengths(self, sequence: WholeSequence) -> None:
        limit = self.config.max_len
        tokens = sequence.gathered_documents().shape[1]
        if limit is None or tokens <= limit:
            return
        longest = int(self.key_places(sequence).max()) + 1 if sequence.packed else tokens
        if longest > limit:
            raise ValueError(
                f"{self.config.kind} got a document of {longest} tokens, but its max_len is "
                f"{limit}; take a larger max_len or shorter documents"
            )


class EntrywiseMixer(StructuredMixer):
    """A materialised matrix: work and memory are quadratic in the length of a row."""

    @abc.abstractmethod
    def entries(self, structure: Structure, sequence: WholeSequence) -> Float[Tensor, "#B H L S"]:
        """All entries, without a mask."""

    @abc.abstractmethod
    def entry_flops(self, queries: int, keys: int) -> MixFlops:
        """Count `entries`."""

    def multiply(
        self, values: Float[Tensor, "B S H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Materialise the matrix, mask it and multiply."""
        with without_autocast(values):
            matrix = self.entries(structure, sequence)
        if self.slot.causal or sequence.packed:
            matrix = matrix.masked_fill(~sequence.visible(causal=self.slot.causal), 0.0)
        return torch.einsum("bhls,bshp->blhp", matrix.to(values.dtype), values)

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Two per channel and visible pair, and the entries."""
        made = self.entry_flops(queries, keys)
        each = 2.0 * self.inner_width
        return MixFlops(
            made.needed + each * self.pairs(queries, keys),
            made.full_square + each * queries * keys,
            made.elementwise,
        )


class PlaceTable(nn.Module):
    """Parameters per position in a document.

    Args:
        shape: shape of all values, positions first.
        draw: draws initial values of that shape.
        decayed: whether weight decay applies.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        draw: Callable[[torch.Size, torch.Generator], Tensor],
        *,
        decayed: bool = True,
    ) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(shape))
        self.no_decay = frozenset() if decayed else frozenset({"values"})
        self._draw = draw

    def forward(self, places: Int[Tensor, "B L"]) -> Float[Tensor, "B L *rest"]:
        """The values at some positions."""
        return self.values[places]

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial values."""
        return self._draw(self.values.shape, generator)


def xavier_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Xavier normal initial values, N(0, 2 / (fan_in + fan_out)), with torch's count of fans."""
    # torch counts the first dimension as outputs and the second as inputs, each times the rest.
    fans = (shape[0] + shape[1]) * math.prod(shape[2:])
    return torch.randn(shape, generator=generator) * math.sqrt(2 / fans)


def _can_align(config: type[MixerConfig]) -> bool:
    return issubclass(config, StructuredConfig) and not issubclass(config, UnalignedConfig)


def _lengths(sequence: WholeSequence) -> Int[Tensor, "B L"]:
    # The position from the document's end; with that from its beginning it gives the length.
    to_end = positions_in_documents(sequence.documents.flip(1)).flip(1)
    return sequence.positions() + to_end + 1
