"""Matrices that pass through slots: each token is written to the slots, and reads from them.

M[t, s] = sum over slots c of weights[t, c] * shares[s, c]. In `SlotMatrix` a slot averages a whole
document, in `CausalSlotMatrix` the tokens so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.slot_attention import Slots, mix_slots
from kernels.precision import widened, without_autocast
from models.sequences.documents import DocumentRows, put_back, tabulate
from models.sequences.recurrence import AssociativeRecurrence
from models.sequences.whole import WholeSequence

SOFTMAX_FLOPS = 5.0
"""Pointwise operations per entry of a softmax: maximum, difference, exp, sum, division."""

RUNNING_FLOPS = 10.0
"""Pointwise operations per token and slot of running averages: six for the log-sum (maximum,
difference, absolute value, exp, log, sum), and a difference and exp for the share and the decay."""


class SlotFilling(NamedTuple):
    """How the tokens of whole documents are written to slots.

    Attributes:
        sequence: the sequence that is written.
        buckets: its documents.
        shares: computes each token's share in each slot, by bucket; lazy, because decoding computes
            slots only in the first chunk.
    """

    sequence: WholeSequence
    buckets: list[DocumentRows]
    shares: Callable[[], list[Float[Tensor, "N S H C"]]]

    def fill(self, x: Float[Tensor, "B S H P"]) -> Float[Tensor, "B D H C P"]:
        """The slots of each row and document: the tokens' features weighted by their shares."""
        shares = self.shares()
        with without_autocast(x):
            parts = [
                torch.einsum("nshc,nshp->nhcp", share, widened(bucket.take(x)))
                for share, bucket in zip(shares, self.buckets, strict=True)
            ]
        return tabulate(parts, self.buckets, self.sequence)


class SlotMatrix(NamedTuple):
    """A matrix per document, whose rank is at most the number of slots.

    A reading token whose document is not on the written side has a row of zeros.

    Attributes:
        filling: how values are written to slots.
        weights: how tokens read the slots, by bucket.
        buckets: the documents that read.
    """

    filling: SlotFilling
    weights: list[Float[Tensor, "N T H C"]]
    buckets: list[DocumentRows]

    def mix(
        self, values: Float[Tensor, "B S H P"], sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply the matrix, in float32 or wider; `sequence` holds the tokens that read."""
        slots = sequence.once(lambda: self.filling.fill(values))
        with without_autocast(values):
            parts = [
                torch.einsum("nthc,nhcp->nthp", weights, bucket.look_up(slots)).to(values.dtype)
                for weights, bucket in zip(self.weights, self.buckets, strict=True)
            ]
        return put_back(parts, self.buckets, sequence)


class CausalSlotMatrix(NamedTuple):
    """A causal matrix: each slot is a softmax-weighted average of the tokens so far.

    Attributes:
        weights: how each token reads the slots.
        logits: the softmax logit of each token in each slot.
        log_sums: log-sum-exp of the logits so far.
    """

    weights: Float[Tensor, "B L H C"]
    logits: Float[Tensor, "B L H C"]
    log_sums: Float[Tensor, "B L H C"]

    def mix(
        self, values: Float[Tensor, "B L H P"], sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply the matrix, in float32 or wider."""
        documents = sequence.packed_documents

        def outputs(state: Tensor | None) -> tuple[Tensor, Tensor]:
            averages, initial = unpacked(state)
            slots = Slots(self.logits, self.log_sums, initial, documents)
            mixed, final = mix_slots(self.weights, values, slots, averages)
            return mixed, packed(final, self.log_sums)

        return sequence.recur(SlotAverages(outputs, self.logits, values, documents))


@dataclass
class SlotAverages(AssociativeRecurrence):
    """Softmax-weighted running averages of tokens, and their log-sum-exps, as a recurrence.

    Attributes:
        outputs: maps an initial state to outputs and the final state.
        logits: the softmax logit of each token in each slot.
        x: what is averaged; None for the log-sums alone.
    """

    outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]]
    logits: Float[Tensor, "B L H C"]
    x: Float[Tensor, "B L H P"] | None
    documents: Int[Tensor, "B L"] | None

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernels."""
        return self.outputs(initial)

    def final_state_from_zero(self) -> Float[Tensor, "B H C *P1"]:
        """The averages over the last token's document, and its log-sums."""
        logits = widened(self.logits)
        if self.documents is not None:
            others = self.documents != self.documents[:, -1:]
            logits = logits.masked_fill(others[:, :, None, None], -math.inf)
        log_sums = logits.logsumexp(dim=1)
        if self.x is None:
            return log_sums
        with without_autocast(logits):
            shares = logits.softmax(dim=1)
            averages = torch.einsum("blhc,blhp->bhcp", shares, self.x.to(shares.dtype))
        return torch.cat([averages, log_sums[..., None]], dim=-1)

    def identity(self, like: Float[Tensor, "B H C *P1"]) -> Float[Tensor, "B H C *P1"]:
        """An empty sum: its logarithm is minus infinity."""
        empty = torch.full_like(like, -math.inf)
        if self.x is not None:
            empty[..., :-1] = 0.0
        return empty

    def join(
        self, before: Float[Tensor, "B H C *P1"], after: Float[Tensor, "B H C *P1"]
    ) -> Float[Tensor, "B H C *P1"]:
        """The average over both spans: their averages, weighted by their sums."""
        if self.x is None:
            return torch.logaddexp(before, after)
        # Each span's share is exp(its log-sum - joint log-sum), at most 1.
        both = torch.logaddexp(before[..., -1:], after[..., -1:])
        earlier, later = (s[..., :-1] * torch.exp(s[..., -1:] - both) for s in (before, after))
        return torch.cat([earlier + later, both], dim=-1)


def packed(
    averages: Float[Tensor, "B H C P"], log_sums: Float[Tensor, "B L H C"]
) -> Float[Tensor, "B H C P+1"]:
    """Averages and log-sums after the last token, as one state."""
    return torch.cat([averages, log_sums[:, -1, :, :, None]], dim=-1)


def unpacked(state: Float[Tensor, "B H C N"] | None) -> tuple[Tensor | None, Tensor | None]:
    """Averages and log-sums of a state; None for no state."""
    return (None, None) if state is None else (state[..., :-1], state[..., -1])
