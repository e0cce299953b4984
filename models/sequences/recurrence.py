"""Recurrences in the form that `recur` of a sequence takes, including over ranks.

Whole and continued sequences only run them from a given state. Over ranks no rank may wait for the
one before: each runs from a zero state, sends what its tokens do to any state, and adds what the
state before its tokens contributes once that is known. The effect on a state is an affine map
(`Recurrence`; Martin and Cundy 2018, section 2.2) or any associative operation
(`AssociativeRecurrence`).
"""

import abc
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kernels.precision import widened, without_autocast
from kernels.scans.bidirectional_ssd import bidirectional_ssd
from kernels.scans.linear_attention import linear_attention
from kernels.scans.linear_scan import linear_scan
from kernels.scans.selective_scan import selective_scan
from kernels.scans.ssd import ssd
from models.ranks.carry import Summary
from models.sequences.whole import WholeSequence


class Recurrence(abc.ABC):
    """A recurrence whose effect on the state is affine.

    Attributes:
        bidirectional: whether the state has twice the rows: first the forward scan's, then those of
            the scan from the end.
    """

    bidirectional: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs from a state before the first token, and the state after the last one."""

    @abc.abstractmethod
    def summary(self) -> Summary:
        """The affine map from the state before the tokens to the state after them."""

    @abc.abstractmethod
    def carried(
        self, initial: Shaped[Tensor, "B *rest"], continues: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L *rest"]:
        """The contribution of a state before the first token to the outputs.

        Args:
            initial: the state.
            continues: marks the tokens in the document that the state belongs to.
        """

    def from_zero(self) -> Tensor:
        """The outputs from a zero state."""
        return self(None)[0]


class AssociativeRecurrence(abc.ABC):
    """A recurrence whose states combine by an associative operation.

    Attributes:
        documents: document of each token; 0 continues the state before the first.
    """

    documents: Int[Tensor, "B L"] | None

    @abc.abstractmethod
    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs from a state before the first token, and the state after the last one."""

    @abc.abstractmethod
    def final_state_from_zero(self) -> Float[Tensor, "B *rest"]:
        """The state after the last token, from a zero state before the first."""

    @abc.abstractmethod
    def identity(self, like: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *rest"]:
        """The identity of `join`: the state before any token."""

    @abc.abstractmethod
    def join(
        self, before: Float[Tensor, "B *rest"], after: Float[Tensor, "B *rest"]
    ) -> Float[Tensor, "B *rest"]:
        """The state after two consecutive spans of tokens, from the states of each."""


@dataclass
class LinearScan(Recurrence):
    """h[t] = exp(log_decay[t]) h[t-1] + values[t] for each channel, and h itself is the output."""

    log_decay: Float[Tensor, "B L E"]
    values: Float[Tensor, "B L E"]
    documents: Int[Tensor, "B L"] | None

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        return linear_scan(self.log_decay, self.values, initial, self.documents)

    def summary(self) -> Summary:
        """The sum of the values, each decayed up to the last token; the decay of all tokens."""
        decayed = torch.exp(sums_after(self.log_decay)) * widened(self.values)
        state = in_last_document(decayed, self.documents).sum(dim=1)
        # Over all tokens, even if a document begins among them: Carry then drops the state before.
        return Summary(state, self.log_decay.sum(dim=1))

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """The state, decayed up to each token."""
        return zero_unless(torch.exp(self.log_decay.cumsum(dim=1)) * initial[:, None], continues)


@dataclass
class SelectiveScan(Recurrence):
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t], and <C[t], h[t]> + D x[t] is the output."""

    values: Float[Tensor, "B L E"]
    dt: Float[Tensor, "B L E"]
    A: Float[Tensor, "E N"]
    B: Float[Tensor, "B L N"]
    C: Float[Tensor, "B L N"]
    documents: Int[Tensor, "B L"] | None
    D: Float[Tensor, "E"]

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        return self._scan(self.values, initial)

    def summary(self) -> Summary:
        """The state from zero; the step sizes' sum, with A as rates, one number per channel."""
        return Summary(self._zero[1], widened(self.dt).sum(dim=1)[..., None], self.A)

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """The outputs of a scan of zero values from the state."""
        # The kernel itself forgets the state where another document begins.
        del continues
        return self._scan(torch.zeros_like(self.values), initial)[0]

    def from_zero(self) -> Tensor:
        """The outputs of the scan that also gave the summary."""
        return self._zero[0]

    @functools.cached_property
    def _zero(self) -> tuple[Tensor, Tensor]:
        return self._scan(self.values, None)

    def _scan(self, values: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        own = (self.dt, self.A, self.B, self.C)
        return selective_scan(values, *own, initial, self.documents, self.D)


@dataclass
class Ssd(Recurrence):
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (x) B[t] for each head; h[t] C[t] + D x[t] comes out.

    Attributes:
        D: None for 0.
    """

    values: Float[Tensor, "B L H P"]
    dt: Float[Tensor, "B L H"]
    A: Float[Tensor, "H"]
    B: Float[Tensor, "B L G N"]
    C: Float[Tensor, "B L G N"]
    documents: Int[Tensor, "B L"] | None
    D: Float[Tensor, "H"] | None = None

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        own = (self.values, self.dt, self.A, self.B, self.C)
        return ssd(*own, initial, self.documents, self.D)

    def summary(self) -> Summary:
        """A single matrix product over all tokens."""
        return ssd_summary(self.values, self.dt, self.A, self.B, self.documents)

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """A single matrix product, decayed up to each token."""
        return ssd_carried(initial, self.dt, self.A, self.C, continues)


@dataclass
class BidirectionalSsd(Recurrence):
    """The sum of an SSD up to the previous token and one from the end to the next token.

    Attributes:
        sequence: gives the neighbouring tokens, also those on other ranks.
    """

    values: Float[Tensor, "B L H P"]
    dt: Float[Tensor, "B L 2 H"]
    A: Float[Tensor, "H"]
    B: Float[Tensor, "B L 2 G N"]
    C: Float[Tensor, "B L 2 G N"]
    sequence: WholeSequence

    bidirectional: ClassVar[bool] = True

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernel, which takes no initial state and returns no final one."""
        assert initial is None, "a bidirectional scan has no initial state"
        documents = self.sequence.packed_documents
        outputs = bidirectional_ssd(self.values, self.dt, self.A, self.B, self.C, documents)
        return outputs, outputs.new_empty(0)

    def summary(self) -> Summary:
        """The forward scan's final state, then that of the scan from the end."""
        # Evaluated before the state is sent, so that its halo exchange comes first on every rank.
        self._reading_C  # noqa: B018
        values, documents = (
            torch.cat([x, x.flip(1)]) for x in (self.values, self.sequence.documents)
        )
        return ssd_summary(values, _stacked(self.dt), self.A, _stacked(self.B), documents)

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """The contribution of both states; output t reads the state with C and decay of t - 1."""
        dt = F.pad(_stacked(self.dt), (0, 0, 1, 0))[:, :-1]
        before, after = ssd_carried(initial, dt, self.A, self._reading_C, continues).chunk(2)
        return before + after.flip(1)

    @functools.cached_property
    def _reading_C(self) -> Float[Tensor, "B2 L G N"]:
        """C of the previous token, then C of the next token in reversed order."""
        around = self.sequence.around(self.C, 1, 1)
        return torch.cat([around[:, :-2, 0], around[:, 2:, 1].flip(1)])


@dataclass
class LinearAttention(Recurrence):
    """S[t] = S[t-1] + keys[t] (x) values[t] for each head, and queries[t] S[t] is the output."""

    queries: Float[Tensor, "B L H N"]
    keys: Float[Tensor, "B L H N"]
    values: Float[Tensor, "B L H P"]
    documents: Int[Tensor, "B L"] | None

    def __call__(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the kernel."""
        return linear_attention(self.queries, self.keys, self.values, initial, self.documents)

    def summary(self) -> Summary:
        """A single matrix product over all tokens, without decay."""
        keys, values = in_last_document(widened(self.keys), self.documents), widened(self.values)
        with without_autocast(keys):
            return Summary(torch.einsum("blhn,blhp->bhnp", keys, values))

    def carried(self, initial: Tensor, continues: Tensor) -> Tensor:
        """The product of each query with the state."""
        with without_autocast(initial):
            read = torch.einsum("blhn,bhnp->blhp", widened(self.queries), initial)
        return zero_unless(read, continues)


def ssd_summary(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    documents: Int[Tensor, "B L"] | None,
) -> Summary:
    """The summary of an SSD's tokens (Dao and Gu 2024, section 8.2, sequence parallelism)."""
    log_decay = widened(dt) * A
    share = torch.exp(sums_after(log_decay)) * widened(dt)
    added = in_last_document(share[..., None] * widened(values), documents)
    with without_autocast(added):
        grouped = added.unflatten(2, (B.shape[2], -1))
        state = torch.einsum("blgrp,blgn->bgrpn", grouped, widened(B)).flatten(1, 2)
    return Summary(state, log_decay.sum(dim=1)[..., None, None])


def ssd_carried(
    initial: Float[Tensor, "B H P N"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    C: Float[Tensor, "B L G N"],
    continues: Bool[Tensor, "B L"],
) -> Float[Tensor, "B L H P"]:
    """The contribution of a state before the first token to the outputs of an SSD."""
    decay = torch.exp((widened(dt) * A).cumsum(dim=1))
    with without_autocast(initial):
        grouped = initial.unflatten(1, (C.shape[2], -1))
        read = torch.einsum("blgn,bgrpn->blgrp", widened(C), grouped).flatten(2, 3)
    return zero_unless(decay[..., None] * read, continues)


def sums_after(x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B L *rest"]:
    """The sum over the tokens after each.

    A reversed cumulative sum: total minus prefix would cancel, and lose small sums near the end.
    """
    later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)
    return later.flip(1).cumsum(dim=1).flip(1)


def in_last_document(
    x: Float[Tensor, "B L *rest"], documents: Int[Tensor, "B L"] | None
) -> Float[Tensor, "B L *rest"]:
    """The features of the last token's document, zeros elsewhere."""
    return x if documents is None else zero_unless(x, documents == documents[:, -1:])


def zero_unless(
    x: Float[Tensor, "B L *rest"], present: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L *rest"]:
    """The features of some tokens, zeros elsewhere."""
    return x.masked_fill(~present.view(*present.shape, *[1] * (x.ndim - 2)), 0.0)


def _stacked(x: Float[Tensor, "B L 2 *rest"]) -> Float[Tensor, "B2 L *rest"]:
    """The forward direction's rows, then the backward direction's with the length reversed."""
    return torch.cat([x[:, :, 0], x[:, :, 1].flip(1)])
