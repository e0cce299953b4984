"""LARA, linear randomized attention: softmax attention by importance sampling (Zheng et al. 2022).

Section 4. Softmax attention is an expectation over w of averages with weights
xi(k_s, w) = exp(w k_s - |k_s|^2 / 2); LARA takes one sample w_c from each of C proposals
N(mu_c, I) and weighs them for each query by

    alpha[t, c] N(w_c; 0, I) / N(w_c; mu_c, I) xi(q_t, w_c) sum_s xi(k_s, w_c),

with mu_c the sum of a segment's mean query and mean key, queries and keys scaled by P^(-1/4).
Factors of a query alone cancel in the normalisation. The query's own preference is CAB's,
alpha[t, c] = exp(q_t mu_c); the authors' own release takes by default the balance heuristic with a
correction that is normalised over queries. Changed: w_c = mu_c, the proposal's mean, always (both
releases draw around it in training, and do this in evaluation); segments are those of a document,
equal up to one token, with one per token in short documents. There is no rotary embedding: a mean
of rotated keys has no position.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.slots import SOFTMAX_FLOPS, SlotFilling, SlotMatrix
from models.sequences.continued import Memory
from models.sequences.documents import DocumentRows, documents_by_length, landmarks_of
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class LARAConfig(HeadsConfig):
    """Sizes of a LARA.

    Attributes:
        n_landmarks: most proposals per document.
    """

    kind: ClassVar[str] = "lara"
    n_landmarks: int = 16

    def __post_init__(self) -> None:
        if self.n_landmarks < 1:
            raise ValueError(f"n_landmarks {self.n_landmarks} is not positive; take 1 or more")


@register(LARAConfig)
class LARA(Mixer):
    """M[t, s] = sum_c weights[t, c] softmax_s(w_c k_s - |k_s|^2 / 2). Rows sum to 1.

    The rank is at most the number of landmarks.
    """

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    stops_nan = True

    def __init__(self, config: LARAConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L H P"], SlotMatrix]:
        """Values are the value heads; weights come from queries, keys and landmarks."""
        del memory
        queries, keys, values = self.heads(x)
        buckets, shares, weights = documents_by_length(sequence), [], []
        for bucket in buckets:
            share, weight = self._importance(bucket, bucket.take(queries), bucket.take(keys))
            shares.append(share)
            weights.append(weight)
        return values, SlotMatrix(SlotFilling(sequence, buckets, lambda: shares), weights, buckets)

    def mix(
        self, values: Float[Tensor, "B L H P"], coefficients: SlotMatrix, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Average the values for each landmark, then the landmarks for each query."""
        return coefficients.mix(values, sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: SlotMatrix
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """Products of C landmarks with queries and keys, and both averages: 8 C P per token.

        Pointwise, by head: for each token 2 P for the scales, 2 P for the means and 2 P + 1 for the
        key's half square; for each landmark 3 P for its mean, 2 P + 1 for its half square, and 3
        for its log-sum and ratio; for each of both, logits and softmaxes of query and key.
        """
        H, P, T = self.config.n_heads, self.heads.head_dim, keys
        C = min(self.config.n_landmarks, T)
        needed = 8.0 * C * P * T
        pairs = 2 + SOFTMAX_FLOPS + 1 + SOFTMAX_FLOPS
        elementwise = T * (6 * P + 1) + C * (5 * P + 4) + C * T * pairs
        return MixFlops(H * needed, H * needed, H * elementwise)

    def _importance(
        self, bucket: DocumentRows, queries: Tensor, keys: Tensor
    ) -> tuple[Float[Tensor, "N T H C"], Float[Tensor, "N T H C"]]:
        """Each key's share in each landmark, and each query's weights of the landmarks."""
        scale = queries.shape[-1] ** -0.25
        q, k = widened(queries) * scale, widened(keys) * scale
        pairs, present = landmarks_of(torch.cat([q, k], dim=2), bucket, self.config.n_landmarks)
        mean_queries, mean_keys = pairs.chunk(2, dim=2)
        mu = mean_queries + mean_keys  # (N, C, H, P)
        with without_autocast(q):
            asked = torch.einsum("nthp,nchp->nthc", q, mu)
            logits = torch.einsum("nthp,nchp->nthc", k, mu)
        logits = bucket.where_present(logits - k.square().sum(dim=-1, keepdim=True) / 2, -math.inf)
        # At w = mu, alpha and xi(q, w) contribute q mu each to the logarithm of a query's weight,
        # hence 2 q mu below, and the ratio of densities contributes -|mu|^2 / 2.
        ratio = (logits.logsumexp(dim=1) - mu.square().sum(dim=-1).transpose(1, 2) / 2)[:, None]
        if present is not None:
            ratio = ratio.masked_fill(~present[:, None, None], -math.inf)
        return logits.softmax(dim=1), (2 * asked + ratio).softmax(dim=-1)
