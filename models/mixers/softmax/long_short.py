"""Long-Short attention: a window for near tokens and averages for far ones (Zhu et al. 2021).

Sections 3.2-3.4 of "Long-Short Transformer". One softmax runs over the keys of a window and over
averages of keys, weighted by a learned map of the tokens (dynamic projection): `rank` averages per
document or, in a causal pattern, `chunk_rank` averages of each chunk that ended before the query's
own chunk. Values are averaged with the same weights. Changed:

- Only keys are normalised, those of the window and the averages by separate norms (the paper's
  DualLN, as a per-head RMS norm). Values are not, so that the output is a matrix times the values.
- The window is centred on the query, or ends with it, instead of being the query's segment.
- In the window rotary embeddings replace the paper's relative positions. Averages have no position,
  so their scores use unrotated queries.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor

from kernels.attention.slot_attention import Slots, slot_averages, slot_log_sums
from kernels.precision import widened
from models.bases.heads import Heads, HeadsConfig, Projected, rotated
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear, RMSNorm
from models.parts.slots import RUNNING_FLOPS, SlotAverages, packed, unpacked
from models.sequences.continued import Memory
from models.sequences.documents import DocumentRows, documents_by_length, put_back
from models.sequences.positions import PADDING
from models.sequences.whole import Collected, WholeSequence


@dataclass(frozen=True)
class LongShortConfig(HeadsConfig):
    """Sizes of a Long-Short attention.

    Attributes:
        window: keys of the window, the query's own included.
        rank: averages per document in the bidirectional pattern.
        chunk: tokens per chunk in the causal pattern.
        chunk_rank: averages per chunk.
        rope_theta: base of the rotary frequencies.
    """

    kind: ClassVar[str] = "long_short"
    window: int = 256
    rank: int = 16
    chunk: int = 32
    chunk_rank: int = 1
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        for name in ("window", "rank", "chunk", "chunk_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")


class Coefficients(NamedTuple):
    """The softmax weights of a bucket's windows and averages, and the weights of the averages.

    Attributes:
        bucket: the documents, in the bidirectional pattern.
        near: weights of the keys around each block of queries.
        far: weights of the averages.
        logits: the softmax logit of each token in each average.
        log_sums: log-sum-exp of the logits in the chunk so far, if causal.
    """

    bucket: DocumentRows
    near: Float[Tensor, "N C H Q K"]
    far: Float[Tensor, "N C H Q S"]
    logits: Float[Tensor, "N T H R"]
    log_sums: Float[Tensor, "N T H R"] | None


@register(LongShortConfig)
class LongShort(Mixer):
    """Rows of M are a softmax over a window's keys and over averages of keys. They sum to 1.

    M is the sum of a banded matrix and one of rank at most the number of averages.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: LongShortConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)
        self.rank = config.chunk_rank if slot.causal else config.rank
        self.control = Linear(slot.d_model, config.n_heads * self.rank, std=config.initial_std)
        self.near_norm = RMSNorm(self.heads.head_dim)
        self.far_norm = RMSNorm(self.heads.head_dim)
        self.scale = self.heads.head_dim**-0.5
        W = config.window
        self.reach = (W - 1, 0) if slot.causal else (W // 2, (W - 1) // 2)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], list[Coefficients]]:
        """Values are the value heads; weights come from queries, keys and the averages' logits."""
        del memory
        projected, logits = self.heads(x), widened(self.control(x))
        logits = logits.unflatten(2, (self.config.n_heads, self.rank))
        near = projected._replace(keys=self.near_norm(projected.keys))
        near = rotated(near, sequence, self.config.rope_theta)
        if self.slot.causal:
            return projected.values, [self._causal(projected, near, logits, sequence)]
        buckets = documents_by_length(sequence)
        return projected.values, [self._whole(each, projected, near, logits) for each in buckets]

    def mix(
        self,
        values: Float[Tensor, "B L H P"],
        coefficients: list[Coefficients],
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """The weighted sum of window values and averages."""
        if self.slot.causal:
            (c,) = coefficients
            assert c.log_sums is not None
            before = sequence.halo(values, self.config.window - 1)
            around = around_blocks(values, before, self.reach, c.near.shape[3])
            averages, _ = self._chunk_averages(values, c.logits, c.log_sums, sequence)
            return _sum(c, around, averages)[:, : values.shape[1]]
        parts = []
        for c in coefficients:
            taken = c.bucket.take(values)
            around = around_blocks(taken, None, self.reach, c.near.shape[3])
            mixed = _sum(c, around, _document_averages(taken, c.logits))
            parts.append(mixed[:, : taken.shape[1]])
        return put_back(parts, [c.bucket for c in coefficients], sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: list[Coefficients]
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """4 P per visible pair of a query with a key or an average, and 4 P per token and average.

        The full square counts all pairs of a block of queries with the keys around it, and all
        pairs with averages. Pointwise, for running averages: log-sum, share and decay per token and
        average, and 2 P for the decay of key and value. Softmaxes are not counted, as in attention.
        """
        H, P, R = self.config.n_heads, self.heads.head_dim, self.rank
        left, right = self.reach
        places = range(keys - queries, keys)
        near = sum(min(t, left) + 1 + min(keys - 1 - t, right) for t in places)
        far, averages, running = queries * R, R, 0.0
        if self.slot.causal:
            far = R * sum(t // self.config.chunk for t in places)
            averages, running = keys // self.config.chunk * R, RUNNING_FLOPS + 2 * P
        block = min(self.config.window, queries)
        formed = -(-queries // block) * block * (min(left, keys - 1) + block + min(right, keys - 1))
        filling = 4.0 * P * R * queries
        return MixFlops(
            H * (4.0 * P * (near + far) + filling),
            H * (4.0 * P * (formed + queries * averages) + filling),
            H * running * R * queries,
        )

    def _whole(
        self, bucket: DocumentRows, projected: Projected, near: Projected, logits: Tensor
    ) -> Coefficients:
        queries, keys = bucket.take(projected.queries), bucket.take(projected.keys)
        logits = bucket.where_present(bucket.take(logits), -math.inf)
        ids = bucket.where_present(queries.new_zeros(queries.shape[:2], dtype=torch.int32), PADDING)
        near = Projected(bucket.take(near.queries), bucket.take(near.keys), keys)
        scores = self._near_scores(near, None, ids, None)
        far = _products(queries, self.far_norm(_document_averages(keys, logits)))
        return Coefficients(bucket, *_weights(scores, far, self.scale), logits, None)

    def _causal(
        self, projected: Projected, near: Projected, logits: Tensor, sequence: WholeSequence
    ) -> Coefficients:
        left = self.config.window - 1
        before, ids_before = sequence.halo(near.keys, left), sequence.halo_documents(left)
        scores = self._near_scores(near, before, sequence.documents, ids_before)
        chunks = self._chunks(sequence)

        def outputs(initial: Tensor | None) -> tuple[Tensor, Tensor]:
            log_sums = slot_log_sums(logits, initial, chunks)
            return log_sums, log_sums[:, -1]

        log_sums = sequence.recur(SlotAverages(outputs, logits, None, chunks))
        keys, ends = self._chunk_averages(projected.keys, logits, log_sums, sequence)
        same = sequence.own_documents()[:, :, None] == ends.documents[:, None]
        # Chunks that ended before the query, in its document.
        seen = same & (ends.positions[:, None] < sequence.positions()[:, :, None])
        far = _products(projected.queries, self.far_norm(keys))
        hidden = ~seen.repeat_interleave(self.rank, dim=2)[:, :, None]
        weights = _weights(scores, far.masked_fill(hidden, -math.inf), self.scale)
        return Coefficients(DocumentRows(), *weights, logits, log_sums)

    def _near_scores(
        self,
        near: Projected,
        before: Tensor | None,
        ids: Int[Tensor, "N T"],
        ids_before: Int[Tensor, "N W"] | None,
    ) -> Float[Tensor, "N C H Q K"]:
        """Scores of blocks of queries with the keys around them; -inf where not visible."""
        T = ids.shape[1]
        block = min(self.config.window, T)
        queries = _in_blocks(near.queries, block)
        keys = around_blocks(near.keys, before, self.reach, block)
        own = F.pad(ids, (0, -T % block), value=PADDING).unflatten(1, (-1, block))
        # Shifted by PADDING, so that the zeros with which around_blocks pads mean PADDING.
        other = around_blocks(ids - PADDING, _less(ids_before), self.reach, block) + PADDING
        place = torch.arange(block, device=ids.device)[:, None]
        offset = torch.arange(keys.shape[-1], device=ids.device) - place
        seen = (offset >= 0) & (offset <= keys.shape[-1] - block)
        seen = seen & (own[:, :, :, None] == other[:, :, None])
        scores = torch.einsum("ncqhp,nchpk->nchqk", queries, keys.to(queries.dtype))
        return widened(scores).masked_fill(~seen[:, :, None], -math.inf)

    def _chunks(self, sequence: WholeSequence) -> Int[Tensor, "B L"]:
        """The chunk of each token; 0 continues the chunk before the first token."""
        begins = sequence.positions() % self.config.chunk == 0
        return begins.cumsum(dim=1)

    def _chunk_averages(
        self, x: Float[Tensor, "B L H P"], logits: Tensor, log_sums: Tensor, sequence: WholeSequence
    ) -> tuple[Float[Tensor, "B S H P"], Collected]:
        """The averages of all complete chunks, and the last token of each."""
        chunks = self._chunks(sequence)

        def outputs(state: Tensor | None) -> tuple[Tensor, Tensor]:
            averages, initial = unpacked(state)
            slots = Slots(logits, log_sums, initial, chunks)
            running, final = slot_averages(x, slots, averages)
            return running, packed(final, log_sums)

        averages = sequence.recur(SlotAverages(outputs, logits, x, chunks))
        ends = sequence.collect(averages, self.config.chunk)
        return ends.features.transpose(2, 3).flatten(1, 2), ends


def around_blocks(
    x: Num[Tensor, "N T *rest"], before: Tensor | None, reach: tuple[int, int], block: int
) -> Num[Tensor, "N C *rest K"]:
    """The features around each block of tokens, padded with zeros.

    Args:
        x: features of the tokens.
        before: features of the reach[0] tokens before the first; None if nothing precedes.
        reach: tokens before a block's first and after its last, clipped to the existing ones.
        block: tokens per block.
    """
    T = x.shape[1]
    left, right = (min(far, T - 1) for far in reach)
    if before is not None:
        x, left = torch.cat([before.to(x.dtype), x], dim=1), reach[0]
    tail = [0, 0] * (x.ndim - 2)
    filled = F.pad(x, (*tail, left if before is None else 0, right + -T % block))
    return filled.unfold(1, left + block + right, block)


def _in_blocks(x: Float[Tensor, "N T H P"], block: int) -> Float[Tensor, "N C Q H P"]:
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))


def _less(ids: Int[Tensor, "N W"] | None) -> Tensor | None:
    return None if ids is None else ids - PADDING


def _products(
    queries: Float[Tensor, "N T H P"], keys: Float[Tensor, "N S H P"]
) -> Float[Tensor, "N T H S"]:
    return widened(torch.einsum("nthp,nshp->nths", queries, keys.to(queries.dtype)))


def _weights(
    near: Float[Tensor, "N C H Q K"], far: Float[Tensor, "N T H S"], scale: float
) -> tuple[Float[Tensor, "N C H Q K"], Float[Tensor, "N C H Q S"]]:
    """A joint softmax over the keys of the window and the averages."""
    far = _in_blocks(far, near.shape[3]).transpose(2, 3)
    shares = (torch.cat([near, far], dim=-1) * scale).softmax(dim=-1)
    return shares[..., : near.shape[-1]], shares[..., near.shape[-1] :]


def _document_averages(
    x: Float[Tensor, "N T H P"], logits: Float[Tensor, "N T H R"]
) -> Float[Tensor, "N R H P"]:
    return torch.einsum("nthr,nthp->nrhp", logits.softmax(dim=1).to(x.dtype), x)


def _sum(
    c: Coefficients, around: Float[Tensor, "N C H P K"], averages: Float[Tensor, "N S H P"]
) -> Float[Tensor, "N T H P"]:
    """The weighted sum of the values around each block and of the averages."""
    near = torch.einsum("nchqk,nchpk->ncqhp", c.near.to(around.dtype), around)
    far = torch.einsum("nchqs,nshp->ncqhp", c.far.to(around.dtype), averages.to(around.dtype))
    return (near + far).flatten(1, 2)
