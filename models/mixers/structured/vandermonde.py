"""Two Vandermonde matrices of tokens' frequencies, their real parts (Hydra paper, section 2.4).

m[i, j] = sum_d cos(2 pi q[i, d] j) - cos(2 pi k[j, d] i), places counted from 0. The release's
learned form contracts the wrong index, so that it mixes nothing, adds where the paper subtracts,
and starts from frequencies of zero, where every gradient is zero. Changed there: the paper's
formula, frequencies counted in turns of the longest document, so that a step changes far entries
no faster than it does in the sequence aligned form, and drawn uniformly over those that differ.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.precision import widened
from models.bases.structured_matrix import EntrywiseMixer, Features, PlaceTable, StructuredConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.whole import WholeSequence

TURNS = 1e-3
"""Turns for each place and unit of a token's channel, as the release has it."""


@dataclass(frozen=True)
class VandermondeConfig(StructuredConfig):
    """Sizes of a Vandermonde matrix.

    Attributes:
        d_qk: pairs of matrices that are summed; frequencies of each token, twice.
    """

    kind: ClassVar[str] = "vandermonde"
    d_qk: int = 16


class Frequencies(NamedTuple):
    """Frequencies of rows and columns, in a unit of the mixer's."""

    rows: Float[Tensor, "B L H N"]
    columns: Float[Tensor, "B S H N"]


@register(VandermondeConfig)
class Vandermonde(EntrywiseMixer):
    """m[i, j] = sum_d cos(2 pi q[i, d] j) - cos(2 pi k[j, d] i).

    Written out: the algorithm that is not quadratic, L log(L)^2, is not implemented here or in the
    release. Cosines come from products of those of a coarse and of a fine grid of places.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: VandermondeConfig, slot: Slot) -> None:
        H, N = config.n_heads, config.d_qk
        aligned = config.sequence_aligned
        gain = 1 / math.sqrt(2 * N)
        super().__init__(config, slot, convolved=2 * H * N * aligned, gain=gain)
        self.d_qk, self.turns = N, TURNS if aligned else 1 / config.longest
        if not aligned:
            shape = (config.longest, H, N)
            self.rows = PlaceTable(shape, _distinct, decayed=False)
            self.columns = PlaceTable(shape, _distinct, decayed=False)

    def structure(self, features: Features, sequence: WholeSequence) -> Frequencies:
        """Frequencies from the tokens' channels, or from their places."""
        if self.config.sequence_aligned:
            heads = features.convolved.unflatten(2, (2, self.config.n_heads, self.d_qk))
            q, k = widened(heads).unbind(2)
            return Frequencies(q, sequence.gather(k))
        rows, columns = self.rows(self.places(sequence)), self.columns(self.key_places(sequence))
        return Frequencies(widened(rows), widened(columns))

    def entries(self, structure: Frequencies, sequence: WholeSequence) -> Float[Tensor, "B H L S"]:
        """Cosines of all pairs, in float32."""
        L, S = structure.rows.shape[1], structure.columns.shape[1]
        own = other = None
        if sequence.packed:
            own, other = self.places(sequence), self.key_places(sequence)
        by_rows = self._cosines(structure.rows, 0, S, other)
        by_columns = self._cosines(structure.columns, S - L, L, own)
        return by_rows.transpose(1, 2) - by_columns.permute(0, 2, 3, 1)

    def entry_flops(self, queries: int, keys: int) -> MixFlops:
        """Products of grids for both matrices, those of pairs that a causal pattern masks too.

        Pointwise, 5 for each frequency and place of a grid (a product, its fraction, a product,
        cosine and sine) and the difference of the matrices.
        """
        H, N = self.config.n_heads, self.d_qk
        products = 2 * 4.0 * H * N * queries * keys
        grids = queries * sum(_grid(keys)) + keys * sum(_grid(queries))
        pointwise = 5.0 * H * N * grids + H * queries * keys
        return MixFlops(products, products, pointwise)

    def _cosines(
        self,
        frequencies: Float[Tensor, "B T H N"],
        first: int,
        count: int,
        places: Int[Tensor, "B K"] | None,
    ) -> Float[Tensor, "B T H K"]:
        """Sum the cosines of N frequencies, at `count` places from `first` or at those given."""
        if places is not None:
            first = int(places.min())
            count = int(places.max()) + 1 - first
        coarse, fine = _grid(count)
        steps = -(torch.arange(coarse, device=frequencies.device) * fine + first)
        grids = (steps, torch.arange(fine, device=frequencies.device))
        # In float32 the whole turns of a distant place would leave no digits for their fraction.
        exact = frequencies.double()[..., None] * self.turns
        angles = [2 * math.pi * (exact * grid).frac().to(frequencies.dtype) for grid in grids]
        # cos(a + b) = cos(a) cos(b) + sin(-a) sin(b)
        left, right = (torch.cat([a.cos(), a.sin()], dim=-2) for a in angles)
        summed = (left.transpose(-1, -2) @ right).flatten(-2)[..., :count]
        if places is None:
            return summed
        index = (places - first).long()[:, None, None, :]
        return summed.gather(-1, index.expand(*summed.shape[:-1], -1))


def _distinct(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw from U(0, places / 2): a cosine at whole places has no other frequencies."""
    return torch.rand(shape, generator=generator) * (shape[0] / 2)


def _grid(count: int) -> tuple[int, int]:
    """Sizes of a coarse and a fine grid that make up `count` places."""
    fine = math.isqrt(count - 1) + 1
    return -(-count // fine), fine
