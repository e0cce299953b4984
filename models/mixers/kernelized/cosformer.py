"""cosFormer: linear attention with a positive feature map and a cosine of distance (Qin 2022).

Sections 3.2 and 3.3. Weights are relu(q_t) relu(k_s) cos(pi (t - s) / (2 max_len)); the cosine
splits into cos cos + sin sin, so each token has 2 P features. Changed: the scale is the constant
`max_len`, not the sequence length, so that a row does not depend on later tokens and causal
patterns are possible. Positions count from 0 in each document, so that all factors are nonnegative
and no sum cancels. Rows are divided by their sum without a floor; a row without weights is zero.
There is no rotary embedding, as the cosine encodes positions.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.slots import SlotFilling, SlotMatrix
from models.sequences.continued import Memory
from models.sequences.documents import DocumentRows, documents_by_length, tabulate
from models.sequences.positions import PADDING
from models.sequences.recurrence import LinearAttention
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class CosformerConfig(HeadsConfig):
    """Sizes of a cosFormer.

    Attributes:
        max_len: the distance at which weights reach zero, and the longest document.
    """

    kind: ClassVar[str] = "cosformer"
    max_len: int = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise ValueError(f"max_len {self.max_len} is not positive; take 1 or more")


class CausalFeatures(NamedTuple):
    """Features of a causal matrix; those of queries are divided by their row's sum."""

    queries: Float[Tensor, "B L H N"]
    keys: Float[Tensor, "B L H N"]


@register(CosformerConfig)
class Cosformer(Mixer):
    """M = D^-1 [relu(q) relu(k)^T * cos(pi (t - s) / (2 max_len))] over the visible keys.

    Rows sum to 1, or are zero. Without a causal self pattern the rank is at most 2 P.
    """

    patterns = frozenset(Pattern)
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True
    ordered_memory = True

    def __init__(self, config: CosformerConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S H P"], SlotMatrix | CausalFeatures]:
        """Values are the value heads; features come from queries, keys and positions."""
        if memory is None:
            other, projected = sequence, self.heads(x)
        else:
            other, projected = memory.sequence, self.heads.across(x, sequence, memory)
        queries = self._features(projected.queries, sequence)
        if self.slot.pattern is Pattern.CAUSAL_SELF:
            keys = self._features(projected.keys, sequence)
            return projected.values, _running(queries, keys, sequence)
        # Lazy: in decoding only the first chunk computes features of a memory's keys.
        keys = lambda: self._features(projected.keys, other)  # noqa: E731
        return projected.values, _low_rank(queries, keys, other, sequence)

    def mix(
        self,
        values: Float[Tensor, "B S H P"],
        coefficients: SlotMatrix | CausalFeatures,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """Sum values by their features, and read the sums."""
        if isinstance(coefficients, SlotMatrix):
            return coefficients.mix(values, sequence)
        queries, keys = coefficients
        return sequence.recur(LinearAttention(queries, keys, values, sequence.packed_documents))

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: SlotMatrix | CausalFeatures
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """With 2 P features: 4 P^2 a key and a query, and 4 P a query for its row's sum, by head.

        Pointwise, for each feature: relu and the factor of the place, and adding up a key's
        features or dividing a query's.
        """
        H, P = self.config.n_heads, self.heads.head_dim
        filled = queries if self.slot.pattern is Pattern.CAUSAL_SELF else keys
        needed = H * (4.0 * P * P * (filled + queries) + 4 * P * queries)
        return MixFlops(needed, needed, H * 5.0 * P * (filled + queries))

    def _features(
        self, x: Float[Tensor, "B L H P"], sequence: WholeSequence
    ) -> Float[Tensor, "B L H N"]:
        """relu(x) times the cosine and times the sine of each position, concatenated."""
        key = ("cosformer", self.config.max_len)
        cos, sin = sequence.memo(key, lambda: _turns(sequence, self.config.max_len))
        positive = F.relu(widened(x))
        return torch.cat([positive * cos.to(positive), positive * sin.to(positive)], dim=-1)


def _turns(sequence: WholeSequence, max_len: int) -> Float[Tensor, "2 B L 1 1"]:
    """Cosine and sine of the angle of each token's position, in float64.

    Raises:
        ValueError: a document is longer than `max_len`.
    """
    places = sequence.positions().masked_fill(sequence.documents == PADDING, 0)
    longest = places.shape[1] if places.is_meta else int(places.max()) + 1
    if longest > max_len:
        raise ValueError(
            f"a document of {longest} tokens is longer than mixer.max_len {max_len}; "
            "take a larger max_len or cut the documents"
        )
    angles = places.double()[..., None, None] * (math.pi / (2 * max_len))
    return torch.stack([angles.cos(), angles.sin()])


def _running(
    queries: Float[Tensor, "B L H N"], keys: Float[Tensor, "B L H N"], sequence: WholeSequence
) -> CausalFeatures:
    # The row sums are the mixed values of a constant 1.
    ones = torch.ones_like(keys[..., :1])
    sums = sequence.recur(LinearAttention(queries, keys, ones, sequence.packed_documents))
    return CausalFeatures(_divided(queries, sums), keys)


def _low_rank(
    queries: Float[Tensor, "B L H N"],
    keys: Callable[[], Float[Tensor, "B S H N"]],
    other: WholeSequence,
    sequence: WholeSequence,
) -> SlotMatrix:
    filled, reading = documents_by_length(other), documents_by_length(sequence)
    shares = functools.cache(lambda: _cut(keys(), filled))

    def totals() -> Tensor:
        return tabulate([each.sum(dim=1) for each in shares()], filled, other)

    table, weights = sequence.once(totals), []
    for bucket in reading:
        asked, total = bucket.take(queries), bucket.look_up(table)
        with without_autocast(asked):
            sums = torch.einsum("nthf,nhf->nth", asked, total)
        weights.append(_divided(asked, sums[..., None]))
    return SlotMatrix(SlotFilling(other, filled, shares), weights, reading)


def _cut(x: Tensor, buckets: list[DocumentRows]) -> list[Tensor]:
    return [bucket.take(x) for bucket in buckets]


def _divided(
    queries: Float[Tensor, "B L H N"], sums: Float[Tensor, "B L H 1"]
) -> Float[Tensor, "B L H N"]:
    """Divide features by row sums; a row with sum 0 has zero weights, whatever it is divided by."""
    return queries / sums.masked_fill(sums == 0, 1.0)
