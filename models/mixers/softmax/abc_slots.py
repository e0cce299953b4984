"""ABC, attention with bounded-memory control: attention to a few slots (Peng et al. 2022).

A slot's key and value are averages of the tokens' keys and values, with weights exp(a[s, c]) from a
learned map of the tokens (section 4, ABC-MLP). In a causal pattern the averages run over the tokens
so far. Changed: CAB's release computes separate logits from keys and from values, which is not a
matrix applied to the values, and its causal path leaves out the sum over tokens; here one control
serves both, as in the paper. There is no rotary embedding: an average of rotated keys has no
position.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.attention.slot_attention import Slots, read_slots, slot_log_sums
from kernels.precision import widened, without_autocast
from models.bases.heads import Heads, HeadsConfig, Projected
from models.mixer import Mixer, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear
from models.parts.slots import (
    RUNNING_FLOPS,
    CausalSlotMatrix,
    SlotAverages,
    SlotFilling,
    SlotMatrix,
    packed,
    unpacked,
)
from models.sequences.continued import Memory
from models.sequences.documents import documents_by_length
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class ABCConfig(HeadsConfig):
    """Sizes of an ABC.

    Attributes:
        n_slots: slots per head.
    """

    kind: ClassVar[str] = "abc"
    n_slots: int = 16

    def __post_init__(self) -> None:
        if self.n_slots < 1:
            raise ValueError(f"n_slots {self.n_slots} is not positive; take 1 or more")


@register(ABCConfig)
class ABC(Mixer):
    """M = softmax(q K~^T / sqrt(P)) S^T, with S the shares of tokens in slots and K~ = S^T k.

    Rows sum to 1. Without a causal self pattern the rank is at most the number of slots.
    """

    patterns = frozenset(Pattern)
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True

    def __init__(self, config: ABCConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.heads = Heads(config, slot)
        self.control = Linear(slot.d_model, config.n_heads * config.n_slots, std=config.initial_std)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S H P"], SlotMatrix | CausalSlotMatrix]:
        """Values are the value heads; weights come from queries, keys and logits."""
        if memory is not None:
            projected, other = self.heads.across(x, sequence, memory), memory.sequence
            seen = other.without_padding(memory.x)
            return projected.values, self._low_rank(projected, seen, other, sequence)
        projected = self.heads(x)
        if self.slot.pattern is Pattern.CAUSAL_SELF:
            return projected.values, self._running(projected, x, sequence)
        return projected.values, self._low_rank(projected, x, sequence, sequence)

    def mix(
        self,
        values: Float[Tensor, "B S H P"],
        coefficients: SlotMatrix | CausalSlotMatrix,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L H P"]:
        """Average the values in each slot, then the slots for each query."""
        return coefficients.mix(values, sequence)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: SlotMatrix | CausalSlotMatrix
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.heads.merge(mixed)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Writing slots, 4 C P per key and head; reading them, 4 C P per query and head.

        Pointwise, for each token, slot and head, where slots are running: log-sum, share and decay,
        and 2 P for the decay of both averages. Softmaxes are not counted, as in attention.
        """
        H, P, C = self.config.n_heads, self.heads.head_dim, self.config.n_slots
        causal = self.slot.pattern is Pattern.CAUSAL_SELF
        filled = queries if causal else keys
        needed = 4.0 * H * C * P * (filled + queries)
        running = H * C * (RUNNING_FLOPS + 2 * P) * queries
        return MixFlops(needed, needed, running if causal else 0.0)

    def _logits(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S H C"]:
        return widened(self.control(x)).unflatten(2, (self.config.n_heads, self.config.n_slots))

    def _running(
        self, projected: Projected, x: Tensor, sequence: WholeSequence
    ) -> CausalSlotMatrix:
        queries, keys, _ = projected
        logits, documents = self._logits(x), sequence.packed_documents

        def outputs(state: Tensor | None) -> tuple[Tensor, Tensor]:
            averages, initial = unpacked(state)
            # Scores and log-sums come out of one recurrence, so that they are sent over ranks
            # together.
            log_sums = slot_log_sums(logits, initial, documents)
            slots = Slots(logits, log_sums, initial, documents)
            scores, final = read_slots(queries, keys, slots, averages)
            return torch.cat([scores, log_sums], dim=-1), packed(final, log_sums)

        scan = SlotAverages(outputs, logits, keys, documents)
        scores, log_sums = sequence.recur(scan).chunk(2, dim=-1)
        return CausalSlotMatrix(
            (scores * queries.shape[-1] ** -0.5).softmax(dim=-1), logits, log_sums
        )

    def _low_rank(
        self, projected: Projected, x: Tensor, other: WholeSequence, sequence: WholeSequence
    ) -> SlotMatrix:
        queries, keys, _ = projected
        filled, reading = documents_by_length(other), documents_by_length(sequence)

        @functools.cache
        def shares() -> list[Tensor]:
            logits = self._logits(x)
            cut = [bucket.where_present(bucket.take(logits), -math.inf) for bucket in filled]
            return [each.softmax(dim=1) for each in cut]

        filling = SlotFilling(other, filled, shares)
        slot_keys = sequence.once(lambda: filling.fill(keys))
        with without_autocast(queries):
            scores = [
                torch.einsum(
                    "nthp,nhcp->nthc", widened(each.take(queries)), each.look_up(slot_keys)
                )
                for each in reading
            ]
        scale = queries.shape[-1] ** -0.5
        return SlotMatrix(filling, [(each * scale).softmax(dim=-1) for each in scores], reading)
