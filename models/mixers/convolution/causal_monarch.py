"""A learned Monarch matrix over positions that is causal by construction, as the sum of two parts.

In M2's release (Fu et al. 2023) the Monarch matrices are fixed: those of the DFT. Learning one
product P L P R of block-diagonal factors does not work causally: triangular blocks leave out pairs
of tokens, full blocks include later tokens. So one part covers pairs within a block of positions,
and another the pairs from a block to a later one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.bases.structured_matrix import Features, Structure, StructuredMixer, UnalignedConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.parts.layers import uniform
from models.sequences.documents import by_document
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class CausalMonarchConfig(UnalignedConfig):
    """A causal Monarch matrix of max_len positions, in blocks of about sqrt(max_len)."""

    kind: ClassVar[str] = "causal_monarch"


@register(CausalMonarchConfig)
class CausalMonarch(StructuredMixer):
    """M = lower triangles within blocks + a Monarch product from earlier blocks to later ones.

    For positions t = b T + i and s = b S + j in blocks of b, entry m[t, s] is inside[T, i, j] if
    T = S and j <= i, second[i, T, S] * first[S, i, j] if S < T, and zero otherwise. For each S and
    i the product's slice over T and j has rank 1 instead of up to b: the rows at offset i of all
    later blocks see block S through the same weighted sum, up to a factor. Work is O(sqrt(max_len))
    per token and channel; a document uses the leading part of the longest one's matrix.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: CausalMonarchConfig, slot: Slot) -> None:
        super().__init__(config, slot)
        H, b = config.n_heads, math.isqrt(config.max_len - 1) + 1
        self.block, K = b, -(-config.max_len // b)
        self.blocks = K
        self.inside = nn.Parameter(torch.empty(H, K, b * (b + 1) // 2))
        self.first = nn.Parameter(torch.empty(H, K - 1, b, b))
        self.second = nn.Parameter(torch.empty(H, b, K * (K - 1) // 2))

    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Nothing but the parameters."""
        del features, sequence

    def multiply(
        self, values: Float[Tensor, "B S H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Multiply each document by the factors; in a later chunk, the tokens by their rows."""
        del structure
        if values.shape[1] == sequence.documents.shape[1]:
            return by_document((values,), sequence, self._factors)
        return torch.einsum("bhls,bshp->blhp", self._rows(sequence).to(values.dtype), values)

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Two for each channel and entry of the factors' leading blocks, or of the rows."""
        b, K = self.block, self._count(keys)
        if queries < keys:
            seen = 2.0 * self.inner_width * self.pairs(queries, keys)
            return MixFlops(seen, 2.0 * self.inner_width * queries * keys)
        within, first, second = K * b * (b + 1) / 2, (K - 1) * b * b, b * K * (K - 1) / 2
        squares = K * b * b + (K - 1) * b * b + b * (K - 1) ** 2
        each = 2.0 * self.inner_width
        return MixFlops(each * (within + first + second), each * squares)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial factors: uniform, as torch's dense maps with the inputs of a full row."""
        inputs = self.blocks if name == "second" else self.block
        return uniform(getattr(self, name).shape, inputs**-0.5, generator)

    def _factors(self, values: Float[Tensor, "N T H P"]) -> Float[Tensor, "N T H P"]:
        """Apply the leading blocks to documents of T tokens, zero-padded to whole blocks."""
        T, b = values.shape[1], self.block
        K = self._count(T)
        blocks = F.pad(values, (0, 0, 0, 0, 0, K * b - T)).unflatten(1, (K, b))
        mixed = torch.einsum("hkij,nkjhc->nkihc", _triangle(self.inside[:, :K], b, 0), blocks)
        if K > 1:
            sums = torch.einsum("hkij,nkjhc->nkihc", self.first[:, : K - 1], blocks[:, :-1])
            # Strictly lower triangular: without its empty first row and last column.
            below = _triangle(self.second[..., : K * (K - 1) // 2], K, -1)[:, :, 1:, :-1]
            later = torch.einsum("hits,nsihc->ntihc", below, sums)
            mixed = torch.cat([mixed[:, :1], mixed[:, 1:] + later], dim=1)
        return mixed.flatten(1, 2)[:, :T]

    def _rows(self, sequence: WholeSequence) -> Float[Tensor, "B H L S"]:
        """The matrix rows of the tokens at hand, one entry per gathered token."""
        b, K = self.block, self.blocks
        places, keys = self.places(sequence)[:, :, None], self.key_places(sequence)[:, None, :]
        T, i, S, j = places // b, places % b, keys // b, keys % b
        inside = _triangle(self.inside, b, 0)[:, T, i, j]
        below, last = _triangle(self.second, K, -1), max(0, K - 2)
        between = below[:, i, T, S]
        if K > 1:
            between = between * self.first[:, S.clamp(max=last), i, j]
        rows = torch.where(T == S, inside, between).transpose(0, 1)
        return rows.masked_fill(~sequence.visible(causal=True), 0.0)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block)


def _triangle(
    entries: Float[Tensor, "*batch X"], size: int, diagonal: int
) -> Float[Tensor, "*batch size size"]:
    """Lower triangular matrices from their entries, row by row."""
    rows, columns = torch.tril_indices(size, size, diagonal, device=entries.device).unbind()
    matrix = entries.new_zeros(*entries.shape[:-1], size, size)
    matrix[..., rows, columns] = entries
    return matrix
