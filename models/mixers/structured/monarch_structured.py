"""A learned Monarch matrix of two block-diagonal factors (Dao et al. 2022; Fu et al. 2023).

M = P L P R, R and L block-diagonal, P the permutation that writes an index b k + p as b p + k:
entry m[b s + l, b k + p] is second[l, s, k] * first[k, l, p], so that each slice of fixed l and k
has rank one. Changed: the inputs are not permuted (as in the second paper), and a document uses the
leading part of the longest one's matrix, so that short documents need few blocks.
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
class MonarchStructuredConfig(UnalignedConfig):
    """A Monarch matrix of max_len positions, rounded up to a square."""

    kind: ClassVar[str] = "monarch_structured"


@register(MonarchStructuredConfig)
class MonarchStructured(StructuredMixer):
    """Two products with blocks of b x b, b = sqrt(positions); 4 b FLOPs per channel and token."""

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    stops_nan = True

    def __init__(self, config: MonarchStructuredConfig, slot: Slot) -> None:
        super().__init__(config, slot)
        b = self.block = math.isqrt(config.max_len - 1) + 1
        self.first = nn.Parameter(torch.empty(config.n_heads, b, b, b))
        self.second = nn.Parameter(torch.empty(config.n_heads, b, b, b))

    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Nothing but the parameters."""
        del features, sequence

    def multiply(
        self, values: Float[Tensor, "B L H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Multiply each document by the factors."""
        del structure
        return by_document((values,), sequence, self._factors)

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Two per channel and entry of the factors' leading blocks."""
        del queries
        b, K = self.block, self._blocks(keys)
        flops = 2.0 * self.inner_width * (K * b * b + b * K * K)
        return MixFlops(flops, flops)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial factors as torch's dense maps of b inputs: U(-1/sqrt(b), 1/sqrt(b))."""
        return uniform(getattr(self, name).shape, self.block**-0.5, generator)

    def _factors(self, values: Float[Tensor, "N T H P"]) -> Float[Tensor, "N T H P"]:
        """Apply the leading blocks to documents of T tokens, zero-padded to whole blocks."""
        T, b = values.shape[1], self.block
        K = self._blocks(T)
        blocks = F.pad(values, (0, 0, 0, 0, 0, K * b - T)).unflatten(1, (K, b))
        inner = torch.einsum("hklp,nkphc->nklhc", self.first[:, :K], blocks)
        outer = torch.einsum("hlsk,nklhc->nslhc", self.second[:, :, :K, :K], inner)
        return outer.flatten(1, 2)[:, :T]

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)
