"""ProbSparse attention: softmax only for queries whose attention is far from uniform (Zhou 2021).

Zhou et al. 2021, "Informer", section 3.2. Changed: the keys on which a query is measured are a
fixed, evenly spread function of its position and its document's length, instead of redrawn at each
call; the mean in the measure is that of the sampled scores (the release divides their sum by the
number of all keys). Queries and keys are rotated.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig, rotated
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.sequences.continued import Memory
from models.sequences.documents import DocumentRows, documents_by_length, put_back
from models.sequences.whole import WholeSequence

# 2^32 over the golden ratio: its multiples are evenly spread modulo 2^32 (Knuth, TAOCP 3, 6.4).
GOLDEN = 2654435769


@dataclass(frozen=True)
class ProbSparseConfig(HeadsConfig):
    """Sizes of a ProbSparse attention.

    Attributes:
        factor: c in c ceil(ln n), the number of chosen queries in a document of n tokens, and of
            the keys on which each query is measured.
        rope_theta: base of the rotary frequencies.
    """

    kind: ClassVar[str] = "probsparse"
    factor: int = 5
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor {self.factor} is not positive; take 1 or more")

    def chosen(self, n: int) -> int:
        """Number of chosen queries in a document of n tokens."""
        return min(n, self.factor * math.ceil(math.log(n)))


class Coefficients(NamedTuple):
    """The chosen queries of a bucket of documents, and the keys.

    Attributes:
        place: position of each chosen query; the length for an unused entry.
        present: False for keys in padding; None for no padding.
    """

    bucket: DocumentRows
    queries: Float[Tensor, "N H U P"]
    keys: Float[Tensor, "N H T P"]
    place: Int[Tensor, "N H U"]
    present: Bool[Tensor, "N 1 1 T"] | None


@register(ProbSparseConfig)
class ProbSparse(Mixer):
    """Rows of M are softmax(q k^T / sqrt(P)) for the chosen queries, and uniform for all others.

    A query is chosen if max_j s_j - mean_j s_j over its sampled scores is among the largest of its
    head and document. The choice has no gradient. Rows sum to 1; the rank is at most the number of
    chosen queries plus one.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    stops_nan = True

    def __init__(self, config: ProbSparseConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], list[Coefficients]]:
        """Values are the value heads; queries and keys determine the matrix."""
        del memory
        queries, keys, values = rotated(self.heads(x), sequence, self.config.rope_theta)
        return values, [
            self._coefficients(bucket, bucket.take(queries), bucket.take(keys))
            for bucket in documents_by_length(sequence)
        ]

    def mix(
        self,
        values: Float[Tensor, "B L H P"],
        coefficients: list[Coefficients],
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """Attend with the chosen queries, and average for all others."""
        parts = [_mix(c.bucket.take(values), c) for c in coefficients]
        return put_back(parts, [c.bucket for c in coefficients], sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: list[Coefficients]
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Per head, with U chosen queries: 2 P U T for the measure, 4 P U T for their attention.

        Pointwise: scale, maximum and sum of the samples, two per query for the measure, and P per
        token for the mean of the values. Softmaxes are not counted, as in attention.
        """
        H, P, T = self.config.n_heads, self.heads.head_dim, keys
        U = self.config.chosen(T)
        elementwise = T * (3.0 * U + 2 + P)
        return MixFlops(H * 6.0 * P * U * T, H * 6.0 * P * U * T, H * elementwise)

    def _coefficients(self, bucket: DocumentRows, queries: Tensor, keys: Tensor) -> Coefficients:
        place = self._choose(bucket, queries, keys)
        T, P = queries.shape[1], queries.shape[-1]
        index = place.clamp(max=T - 1)[..., None].expand(*place.shape, P)
        chosen = queries.transpose(1, 2).gather(2, index)
        present = None if bucket.present is None else bucket.present[:, None, None]
        return Coefficients(bucket, chosen, keys.transpose(1, 2), place, present)

    @torch.no_grad()
    def _choose(self, bucket: DocumentRows, queries: Tensor, keys: Tensor) -> Int[Tensor, "N H U"]:
        N, T = queries.shape[:2]
        if queries.is_meta:
            return torch.zeros(
                N, queries.shape[2], self.config.chosen(T), dtype=torch.int64, device="meta"
            )
        lengths = bucket.lengths(queries)
        # In Python: a logarithm in floating point on another device could round to another number.
        quotas = lengths.new_tensor([self.config.chosen(n) for n in lengths.tolist()])
        most = int(quotas.max())
        measure = _measure(widened(queries), widened(keys), lengths, quotas)
        measure = bucket.where_present(measure, float("-inf"))
        place = measure.transpose(1, 2).topk(most, dim=2).indices
        spare = torch.arange(most, device=place.device) >= quotas[:, None, None]
        return place.masked_fill(spare, T)


def sampled_keys(
    lengths: Int[Tensor, "N"], tokens: int, quotas: Int[Tensor, "N"], sample: int
) -> Int[Tensor, "N T"]:
    """The key of one of each query's samples; depends only on position and document length."""
    query = torch.arange(tokens, device=lengths.device)
    spread = (query * quotas[:, None] + sample + 1) * GOLDEN % 2**32
    return spread * lengths[:, None] >> 32


def _measure(
    queries: Float[Tensor, "N T H P"],
    keys: Float[Tensor, "N T H P"],
    lengths: Int[Tensor, "N"],
    quotas: Int[Tensor, "N"],
) -> Float[Tensor, "N T H"]:
    """Maximum minus mean of each query's sampled scores; 0 for a document without samples."""
    N, T, H, P = queries.shape
    largest = queries.new_full((N, T, H), float("-inf"))
    total = torch.zeros_like(largest)
    rows = torch.arange(N, device=lengths.device)[:, None]
    for sample in range(int(quotas.max())):
        taken = keys[rows, sampled_keys(lengths, T, quotas, sample)]
        scores = (queries * taken).sum(dim=-1) * P**-0.5
        counts = (sample < quotas)[:, None, None]
        largest = torch.where(counts, largest.maximum(scores), largest)
        total = torch.where(counts, total + scores, total)
    mean = total / quotas.clamp(min=1)[:, None, None]
    return torch.where(quotas[:, None, None] > 0, largest - mean, 0.0)


def _mix(values: Float[Tensor, "N T H P"], c: Coefficients) -> Float[Tensor, "N T H P"]:
    seen = values.transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        c.queries, c.keys, seen.to(c.keys.dtype), attn_mask=c.present
    )
    with without_autocast(values):
        lengths = c.bucket.lengths(values)[:, None, None]
        mean = (widened(values).sum(dim=1) / lengths).to(values.dtype)
    # One more row takes the unused entries, and is dropped.
    rows = mean[:, :, None].expand(-1, -1, values.shape[1] + 1, -1)
    index = c.place[..., None].expand(*c.place.shape, values.shape[-1])
    return rows.scatter(2, index, attended.to(values.dtype))[:, :, :-1].transpose(1, 2)
