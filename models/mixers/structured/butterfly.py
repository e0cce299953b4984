"""A butterfly matrix: a product of log2(n) factors with two entries a row (Dao et al. 2019).

Factor t mixes positions that differ only in bit t of their index, the lowest bit first, without a
bit-reversal permutation. So a document of up to 2^c tokens needs 2 x 2 blocks in the first c
factors
and only their first entries in the others: its matrix is the leading part of the longest
document's, at a cost that depends on its own length.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from models.bases.structured_matrix import Features, Structure, StructuredMixer, UnalignedConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.documents import by_document
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class ButterflyConfig(UnalignedConfig):
    """A butterfly matrix of max_len positions, rounded up to a power of two."""

    kind: ClassVar[str] = "butterfly"


@register(ButterflyConfig)
class Butterfly(StructuredMixer):
    """M = B[last] ... B[1] B[0]; B[t] has a 2 x 2 block for each pair of positions 2^t apart.

    Parameters are (factor, head, pair, row, column), pairs in the order of their positions.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    stops_nan = True

    def __init__(self, config: ButterflyConfig, slot: Slot) -> None:
        super().__init__(config, slot)
        self.levels = _bits(config.max_len)
        pairs = 2**self.levels // 2
        self.factors = nn.Parameter(torch.empty(self.levels, config.n_heads, pairs, 2, 2))

    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Nothing but the parameters."""
        del features, sequence

    def multiply(
        self, values: Float[Tensor, "B L H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Multiply each document by the factors, in float32."""
        del structure
        return by_document((widened(values),), sequence, self._factors)

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:
        """Four per channel, factor and position of the padded document."""
        del queries
        c = _bits(keys)
        flops = 4.0 * self.inner_width * c * 2**c
        rest = self.levels - c
        each = self.inner_width + self.config.n_heads * (rest - 1) if rest else 0
        return MixFlops(flops, flops, float(each * 2**c))

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Random rotations, so that M starts orthogonal at any size."""
        angles = torch.rand(self.factors.shape[:3], generator=generator) * (2 * math.pi)
        rows = [torch.stack([angles.cos(), -angles.sin()], -1)]
        rows.append(torch.stack([angles.sin(), angles.cos()], -1))
        return torch.stack(rows, dim=-2)

    def _factors(self, values: Float[Tensor, "N T H P"]) -> Float[Tensor, "N T H P"]:
        T = values.shape[1]
        c = _bits(T)
        mixed = F.pad(values, (0, 0, 0, 0, 0, 2**c - T))
        factors = widened(self.factors)
        for t in range(c):
            pairs = mixed.unflatten(1, (-1, 2, 2**t))
            blocks = factors[t, :, : 2**c // 2].permute(1, 2, 3, 0).unflatten(0, (-1, 2**t))
            rows = blocks.permute(2, 0, 3, 1, 4)[..., None]  # (row, group, column, place, H, 1)
            mixed = torch.stack([(row * pairs).sum(2) for row in rows], dim=2).flatten(1, 3)
        if c < self.levels:
            # In higher factors the second input of each pair is padding, so only the first entry
            # acts.
            firsts = factors[c:, :, : 2**c, 0, 0].prod(dim=0)
            mixed = mixed * firsts.t()[..., None]
        return mixed[:, :T]


def _bits(tokens: int) -> int:
    """Number of factors that mix `tokens` tokens."""
    return (tokens - 1).bit_length()
