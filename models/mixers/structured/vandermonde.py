"""Real parts of two Vandermonde matrices with frequencies from tokens (Hydra, section 2.4).

m[i, j] = sum_d cos(2 pi q[i, d] j) - cos(2 pi k[j, d] i), positions from 0. The release's learned
form contracts the wrong index, so that it mixes nothing, adds where the paper subtracts, and starts
at frequencies of zero, where all gradients vanish. Changed in that form: the paper's formula, with
frequencies in cycles per longest document, so that a step changes distant entries no faster than in
the sequence-aligned form, drawn uniformly over the distinct ones.
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
"""Cycles per position and unit of a token's channel, as in the release."""


@dataclass(frozen=True)
class VandermondeConfig(StructuredConfig):
    """Sizes of a Vandermonde matrix.

    Attributes:
        d_qk: number of pairs of matrices in the sum; a token has two frequencies for each.
    """

    kind: ClassVar[str] = "vandermonde"
    d_qk: int = 16


class Frequencies(NamedTuple):
    """Frequencies of rows and columns, in units of `Vandermonde.turns`."""

    rows: Float[Tensor, "B L H N"]
    columns: Float[Tensor, "B S H N"]


@register(VandermondeConfig)
class Vandermonde(EntrywiseMixer):
    """m[i, j] = sum_d cos(2 pi q[i, d] j) - cos(2 pi k[j, d] i).

    Materialised: the fast algorithm takes L log(L)^2 and is implemented neither here nor in the
    release. Cosines are computed as products over a coarse and a fine grid of positions.
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
        """Frequencies from the tokens' channels, or from their positions."""
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
        """Products of grids for both matrices, including pairs that a causal pattern masks.

        Pointwise, 5 per frequency and grid position (product, fractional part, product, cosine and
        sine) and the difference of the matrices.
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
        """Sum the cosines of N frequencies at `count` positions from `first`, or at `places`."""
        if places is not None:
            first = int(places.min())
            count = int(places.max()) + 1 - first
        coarse, fine = _grid(count)
        steps = -(torch.arange(coarse, device=frequencies.device) * fine + first)
        grids = (steps, torch.arange(fine, device=frequencies.device))
        # In float64: at distant positions whole cycles would leave float32 no digits for the phase.
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
    """Draw from U(0, positions / 2); other frequencies alias with these at integer positions."""
    return torch.rand(shape, generator=generator) * (shape[0] / 2)


def _grid(count: int) -> tuple[int, int]:
    """Sizes of a coarse and a fine grid whose sums cover `count` positions."""
    fine = math.isqrt(count - 1) + 1
    return -(-count // fine), fine
