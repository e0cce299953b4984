"""SCOUT: attention to checkpoints, the last tokens of earlier segments (Jafari et al. 2025).

A token sees itself and one key and value per earlier segment of k tokens of its document: those of
the segment's last token. Other tokens contribute only through mixers of other layers. After the
authors' release. Changed: segments start at the beginning of each document; keys may be normalised
and shared by heads; a segment's keys and values may be averaged, evenly or by learned weights,
which is not published.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.attention.checkpoint_attention import Places, Segments, checkpoint_attention
from kernels.precision import widened
from models.bases.grouped_heads import GroupedHeads, GroupedHeadsConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.parts.rotary import rotate
from models.sequences.continued import Memory
from models.sequences.whole import Collected, WholeSequence

POOLING_FLOPS = {"last": 0, "mean": 4, "learned": 6}
"""FLOPs per channel of a key: the weighted sums of keys and values, and learned weights."""


@dataclass(frozen=True)
class ScoutConfig(GroupedHeadsConfig):
    """Heads and segments of a SCOUT.

    Attributes:
        every: tokens per segment, k.
        pooling: how a segment is represented. last: by its last token's key and value, as
            published; mean: by the means of keys, rotated like the last, and values; learned: by
            averages weighted by a softmax of the keys' products with a learned query.
    """

    kind: ClassVar[str] = "scout"
    every: int = 10
    pooling: Literal["last", "mean", "learned"] = "last"
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every {self.every} is not positive; take 1 token or more")


class Coefficients(NamedTuple):
    """Queries, own keys, and the checkpoints' keys with their documents and positions.

    Attributes:
        weights: weight of each token in its pooled segment; None without pooling.
    """

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B L G P"]
    checkpoints: Collected
    weights: Float[Tensor, "B S K G"] | None


@register(ScoutConfig)
class Scout(GroupedHeads):
    """M = softmax(queries keys^T / sqrt(P)) over the own key and the earlier checkpoints."""

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: ScoutConfig, slot: Slot) -> None:
        super().__init__(config, slot)
        self.config = config
        if config.pooling == "learned":
            self.pool_query = nn.Parameter(torch.empty(self.n_kv_heads, self.head_dim))

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L G P"], Coefficients]:
        """Values are the value heads; queries, keys and checkpoint keys determine the matrix."""
        del memory
        queries, keys, values = self.heads(x)
        by, pooled, weights = self.rotation(sequence), keys, None
        if self.config.pooling != "last":
            segments = self._segments(keys, sequence)
            weights = self._weights(segments)
            pooled = self._at_ends(segments, weights, keys, sequence)
        checkpoints = sequence.collect(rotate(pooled, by), self.config.every)
        return values, Coefficients(rotate(queries, by), rotate(keys, by), checkpoints, weights)

    def mix(
        self, values: Float[Tensor, "B L G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Attend; the decoding state is the checkpoints and, with pooling, the open segment."""
        queries, keys, checkpoints, weights = coefficients
        pooled = values
        if weights is not None:
            pooled = self._at_ends(self._segments(values, sequence), weights, values, sequence)
        seen, sight = (
            sequence.collect(pooled, self.config.every),
            self._sight(checkpoints, sequence),
        )
        return checkpoint_attention(
            queries, keys, values, checkpoints.features, seen.features, sight
        )

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Two products of head_dim per visible pair (Transformer card, D.3), and pooling.

        The full square counts all pairs of queries and checkpoints, and the own keys.
        """
        each, every = 4.0 * self.n_heads * self.head_dim, self.config.every
        pairs = _pairs_before(keys, every) - _pairs_before(keys - queries, every)
        pooling = POOLING_FLOPS[self.config.pooling] * queries * self.n_kv_heads * self.head_dim
        return MixFlops(
            needed=each * pairs + pooling,
            full_square=each * queries * (keys // every + 1) + pooling,
        )

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial query of learned pooling: small, so that pooling starts near the mean."""
        std = self.config.initial_std or self.head_dim**-0.5
        return torch.randn(self.pool_query.shape, generator=generator) * std

    def _sight(self, checkpoints: Collected, sequence: WholeSequence) -> Segments | Places:
        if sequence.packed:
            documents, places = sequence.own_documents(), sequence.positions()
            return Places(documents, places, checkpoints.documents, checkpoints.positions)
        before = sequence.gathered_documents().shape[1] - sequence.documents.shape[1]
        return Segments(self.config.every, before)

    def _segments(
        self, x: Float[Tensor, "B L G P"], sequence: WholeSequence
    ) -> Float[Tensor, "B S K G P"]:
        """The features of all tokens of each segment that ends here, in float32."""
        every = self.config.every
        before = sequence.halo(x, every - 1)
        if before is None:
            before = x.new_zeros((x.shape[0], every - 1, *x.shape[2:]))
        # With every - 1 tokens in front, the segment that ends at token t begins at index t.
        index = self._ends(sequence)[:, :, None] + torch.arange(every, device=x.device)
        return widened(torch.cat([before, x], dim=1))[_rows(index), index]

    def _weights(self, keys: Float[Tensor, "B S K G P"]) -> Float[Tensor, "B S K G"]:
        if self.config.pooling == "mean":
            return torch.full_like(keys[..., 0], 1 / self.config.every)
        scores = (keys * widened(self.pool_query)).sum(-1) * self.head_dim**-0.5
        return scores.softmax(dim=2)

    def _at_ends(
        self, segments: Tensor, weights: Tensor, like: Tensor, sequence: WholeSequence
    ) -> Float[Tensor, "B L G P"]:
        """The average of each segment at its last token; other tokens are arbitrary."""
        pooled = (segments * weights[..., None]).sum(dim=2).to(like.dtype)
        index = self._ends(sequence)
        return torch.zeros_like(like).index_put((_rows(index), index), pooled)

    def _ends(self, sequence: WholeSequence) -> Int[Tensor, "B S"]:
        """Index of the tokens that end a segment, first; rows with fewer are filled with others.

        A row has at most ceil(L / k) ends: the first document may continue a segment, all others
        begin one.
        """
        every = self.config.every
        room = -(-sequence.documents.shape[1] // every)

        def find() -> Tensor:
            inside = (sequence.positions() + 1) % every != 0
            return torch.argsort(inside.to(torch.int8), dim=1, stable=True)[:, :room]

        return sequence.memo(("segments", every), find)


def _rows(index: Int[Tensor, "B *places"]) -> Int[Tensor, "B *ones"]:
    rows = torch.arange(index.shape[0], device=index.device)
    return rows.view(-1, *[1] * (index.ndim - 1))


def _pairs_before(tokens: int, every: int) -> int:
    """Visible pairs of the first tokens: each sees itself and the segments that ended before."""
    segments, rest = divmod(tokens, every)
    return tokens + every * segments * (segments - 1) // 2 + rest * segments
