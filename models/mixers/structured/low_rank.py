"""A matrix of low rank, q k^T: linear attention without normaliser (Hydra paper, proposition 2.6).

As in the paper's ablation the feature map of queries and keys is a SiLU.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.precision import widened, without_autocast
from models.bases.separable import chunk_flops
from models.bases.structured_matrix import (
    Features,
    PlaceTable,
    StructuredConfig,
    StructuredMixer,
    xavier_normal,
)
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.documents import by_document
from models.sequences.recurrence import LinearAttention
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class LowRankConfig(StructuredConfig):
    """Sizes of a matrix of low rank.

    Attributes:
        d_qk: rank of the matrix.
    """

    kind: ClassVar[str] = "low_rank"
    d_qk: int = 16


class Factors(NamedTuple):
    """Queries and keys."""

    q: Float[Tensor, "B L H N"]
    k: Float[Tensor, "B L H N"]


@register(LowRankConfig)
class LowRank(StructuredMixer):
    """m[i, j] = q[i] . k[j], for j <= i in a causal pattern; work is linear in the length.

    Bidirectional: through each document's sum of key-value products; causal: their running sum.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    remembers = False
    constant_state = True

    def __init__(self, config: LowRankConfig, slot: Slot) -> None:
        H, N = config.n_heads, config.d_qk
        aligned = config.sequence_aligned
        super().__init__(config, slot, convolved=2 * H * N * aligned, gain=1 / math.sqrt(N))
        self.d_qk = N
        if not aligned:
            self.q = PlaceTable((config.longest, H, N), xavier_normal)
            self.k = PlaceTable((config.longest, H, N), xavier_normal)

    def structure(self, features: Features, sequence: WholeSequence) -> Factors:
        """Queries and keys from the tokens' channels, or from their positions."""
        if self.config.sequence_aligned:
            heads = F.silu(features.convolved).unflatten(2, (2, self.config.n_heads, self.d_qk))
            return Factors(*heads.unbind(2))
        places = self.places(sequence)
        return Factors(self.q(places), self.k(places))

    def multiply(
        self, values: Float[Tensor, "B L H P"], structure: Factors, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Sum key-value products over the document or up to each token, then apply queries."""
        q, k = structure
        if not self.slot.causal:
            inputs = (widened(values), widened(q), widened(k))
            with without_autocast(values):
                return by_document(inputs, sequence, _through_sums)
        documents = sequence.packed_documents
        return sequence.recur(LinearAttention(q, k, values, documents))

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Two products of d_qk per channel and token: into the sums and out of them.

        The causal pattern works by chunks, and adds the pairs within them.
        """
        if self.slot.causal:
            return chunk_flops(queries, self.inner_width, self.config.n_heads, self.d_qk)
        flops = 4.0 * self.d_qk * self.inner_width * queries
        return MixFlops(flops, flops)


def _through_sums(
    values: Float[Tensor, "N T H P"], q: Float[Tensor, "N T H K"], k: Float[Tensor, "N T H K"]
) -> Float[Tensor, "N T H P"]:
    sums = torch.einsum("nthk,nthp->nhkp", k, values)
    return torch.einsum("nthk,nhkp->nthp", q, sums)
