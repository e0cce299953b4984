"""Performer: softmax attention by positive random features, FAVOR+ (Choromanski et al. 2021).

Sections 2.2-2.4: phi_f(x) = exp(w_f x - |x|^2 / 2), with x scaled by P^(-1/4) and w drawn
orthogonally within blocks of P features, their lengths as those of normal vectors. With l_f the
logarithm of sum_s phi_f(k_s) over the visible keys, the normalised operator is

    M[t, s] = sum_f softmax_f(w_f q_t + l_f) phi_f(k_s) / exp(l_f):

an average over keys for each feature, and a softmax over features. Every factor is at most 1, and
the query's norm and stabiliser cancel: no maximum over all tokens is needed, which would see the
future and other documents, and no constant added to features. Changed: that form; features are not
redrawn during training, but depend only on their sizes and `feature_seed`, are the same in all
layers and are not stored. In self patterns queries and keys are rotated.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kernels.attention.slot_attention import slot_log_sums
from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig, Projected, rotated
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.slots import (
    RUNNING_FLOPS,
    SOFTMAX_FLOPS,
    CausalSlotMatrix,
    SlotAverages,
    SlotFilling,
    SlotMatrix,
)
from models.sequences.continued import Memory
from models.sequences.documents import documents_by_length, tabulate
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class PerformerConfig(HeadsConfig):
    """Sizes of a Performer.

    Attributes:
        n_features: random features of each head.
        feature_seed: seed of the features, besides their sizes.
        rope_theta: base of the rotary frequencies of self patterns.
    """

    kind: ClassVar[str] = "performer"
    n_features: int = 64
    feature_seed: int = 0
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise ValueError(f"n_features {self.n_features} is not positive; take 1 or more")


@register(PerformerConfig)
class Performer(Mixer):
    """M = D^-1 phi(q) phi(k)^T over the visible keys. Rows sum to 1.

    Without a causal self pattern the rank is at most the number of features.
    """

    patterns = frozenset(Pattern)
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True

    def __init__(self, config: PerformerConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S H P"], SlotMatrix | CausalSlotMatrix]:
        """Values are the value heads; weights come from features of queries and keys."""
        if memory is not None:
            projected = self.heads.across(x, sequence, memory)
            return projected.values, self._low_rank(projected, memory.sequence, sequence)
        projected = rotated(self.heads(x), sequence, self.config.rope_theta)
        if self.slot.pattern is Pattern.CAUSAL_SELF:
            return projected.values, self._running(projected, sequence)
        return projected.values, self._low_rank(projected, sequence, sequence)

    def mix(
        self,
        values: Float[Tensor, "B S H P"],
        coefficients: SlotMatrix | CausalSlotMatrix,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """Average the values for each feature, then the features for each query."""
        return coefficients.mix(values, sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: SlotMatrix | CausalSlotMatrix
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """F features of queries and keys, and both averages, 2 F P each per token and head.

        Pointwise, by head: P for the scale of a query or key, 2 P + 1 for a key's half square; for
        each feature and query, adding the log-sum and the softmax; for each feature and key, the
        logit and the softmax, whose log-sum takes 2 more, or, running, log-sum, share, decay and P
        for the decay of the average.
        """
        H, P, F = self.config.n_heads, self.heads.head_dim, self.config.n_features
        causal = self.slot.pattern is Pattern.CAUSAL_SELF
        filled = queries if causal else keys
        needed = 4.0 * H * F * P * (filled + queries)
        share = RUNNING_FLOPS + P if causal else SOFTMAX_FLOPS
        asked = queries * (P + F * (1 + SOFTMAX_FLOPS))
        pointwise = asked + filled * (3 * P + 1 + F * (1 + share)) + (0 if causal else 2 * F)
        return MixFlops(needed, needed, H * pointwise)

    def _running(self, projected: Projected, sequence: WholeSequence) -> CausalSlotMatrix:
        queries, logits = self._features(projected.queries), self._logits(projected.keys)

        documents = sequence.packed_documents

        def outputs(initial: Tensor | None) -> tuple[Tensor, Tensor]:
            log_sums = slot_log_sums(logits, initial, documents)
            return log_sums, log_sums[:, -1]

        log_sums = sequence.recur(SlotAverages(outputs, logits, None, documents))
        return CausalSlotMatrix((queries + log_sums).softmax(dim=-1), logits, log_sums)

    def _low_rank(
        self, projected: Projected, other: WholeSequence, sequence: WholeSequence
    ) -> SlotMatrix:
        queries, keys, _ = projected
        filled, reading = documents_by_length(other), documents_by_length(sequence)

        @functools.cache
        def logits() -> list[Tensor]:
            found = self._logits(keys)
            return [bucket.where_present(bucket.take(found), -math.inf) for bucket in filled]

        def log_sums() -> Tensor:
            return tabulate([each.logsumexp(dim=1) for each in logits()], filled, other)

        filling = SlotFilling(other, filled, lambda: [each.softmax(dim=1) for each in logits()])
        table, asked = sequence.once(log_sums), self._features(queries)
        weights = [
            (bucket.take(asked) + bucket.look_up(table)[:, None]).softmax(dim=-1)
            for bucket in reading
        ]
        return SlotMatrix(filling, weights, reading)

    def _features(self, x: Float[Tensor, "B L H P"]) -> Float[Tensor, "B L H F"]:
        """w_f x for each feature, x scaled by P^(-1/4)."""
        H, P = x.shape[-2:]
        wide = widened(x) * P**-0.25
        sizes = (H, self.config.n_features, P)
        features = _placed_features(sizes, self.config.feature_seed, wide.device, wide.dtype)
        with without_autocast(x):
            return torch.einsum("blhp,hfp->blhf", wide, features)

    def _logits(self, keys: Float[Tensor, "B S H P"]) -> Float[Tensor, "B S H F"]:
        """The logarithm of each feature of the keys."""
        # |k|^2 of the scaled key: the scale P^(-1/4) enters squared.
        square = widened(keys).square().sum(dim=-1, keepdim=True) * keys.shape[-1] ** -0.5
        return self._features(keys) - square / 2


@functools.cache
def _placed_features(
    sizes: tuple[int, int, int], seed: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "H F P"]:
    # Cached across calls: an inference tensor, made in evaluation, could not be used in training.
    with torch.inference_mode(False):
        return torch.tensor(orthogonal_features(*sizes, seed), device=device, dtype=dtype)


def orthogonal_features(
    n_heads: int, n_features: int, head_dim: int, seed: int
) -> Float[np.ndarray, "H F P"]:
    """Draw the features of each head, orthogonal within blocks of head_dim, in float64."""
    blocks = -(-n_features // head_dim)
    generator = np.random.Generator(np.random.PCG64([seed, n_features, head_dim]))
    drawn = generator.standard_normal((n_heads, blocks, head_dim, head_dim))
    rotations, upper = np.linalg.qr(drawn)
    # With these signs the orthogonal matrices are Haar-distributed (Mezzadri 2007, section 5).
    rotations = rotations * np.sign(np.diagonal(upper, axis1=-2, axis2=-1))[..., None, :]
    lengths = np.linalg.norm(generator.standard_normal(drawn.shape), axis=-1, keepdims=True)
    features = rotations.swapaxes(-1, -2) * lengths
    return features.reshape(n_heads, blocks * head_dim, head_dim)[:, :n_features]
