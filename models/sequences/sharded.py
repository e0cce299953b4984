"""Sequence parallelism: a sequence in contiguous shards, one per rank of a process group."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.convolution.long_conv import long_conv
from kernels.convolution.online_conv import Taps
from models.ranks.carry import Carry
from models.ranks.communicator import Communicator
from models.ranks.exchange import Spans, fetch, swap, swap_back
from models.ranks.schemes import Scheme
from models.sequences.positions import (
    PADDING,
    check_documents,
    picked,
    picked_places,
    positions_in_documents,
    segment_ends,
)
from models.sequences.recurrence import AssociativeRecurrence, Recurrence
from models.sequences.whole import Collected, WholeSequence


class ShardedSequence(WholeSequence):
    """One rank's shard of the rows; the other shards are reached by communication.

    Args:
        documents: this rank's shard of the document ids that a `WholeSequence` of the full rows
            would take. Shards may differ in length but not be empty.
        group: the ranks in the order of their shards; all must construct the sequence together.
        scheme: how states go from rank to rank; None for the fastest by
            `models.ranks.schemes.choose`.

    Attributes:
        documents: the shard's ids, renumbered so that 0 continues the last token before it.
        ranks: the communicator; `ranks.sent` records what this rank sent.

    Raises:
        ValueError: the ranks hold different numbers of rows, one holds no token, or the ids are
            out of order.
    """

    def __init__(
        self,
        documents: Int[Tensor, "B L"],
        group: dist.ProcessGroup,
        scheme: Scheme | None = None,
    ) -> None:
        self.ranks, self.scheme = Communicator(group), scheme
        self.spans = _spans(documents, self.ranks)
        self._row = _whole_rows(documents, self.spans, self.ranks)
        # The whole row, so that all ranks refuse it together.
        check_documents(self._row)
        begin, end = self.spans.each[self.ranks.rank]
        self._begin, self._end = begin, end
        # The document of the last token of the previous shard becomes 0.
        before = self._row[:, begin - 1 : begin] if begin else torch.zeros_like(documents[:, :1])
        super().__init__(torch.where(documents == PADDING, PADDING, documents - before))
        # Of the whole row, not the shard: ranks that branch differently would deadlock.
        self.packed = bool(self._row[:, -1].any())
        self.padded = self.packed and bool((documents[:, -1] == PADDING).any())

    def positions(self) -> Int[Tensor, "B L"]:
        """The position of each token in its document, earlier shards included."""
        return self._all_positions()[:, self._begin : self._end]

    def own_documents(self) -> Int[Tensor, "B L"]:
        """The document id of each token in the whole row."""
        return self._row[:, self._begin : self._end]

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token up to the last one of this shard."""
        return self._row[:, : self._end]

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Float[Tensor, "B W *rest"]:
        """The `left` inputs before this shard; zeros where its document had not begun."""
        if left == 0:
            return x[:, :0]
        wanted = self.spans.before(left)
        before = fetch(x, self.spans, wanted, self.ranks, "halo")
        before = _filled(before, left - before.shape[1], 0)
        # A halo may reach into earlier documents, whose features must not enter.
        others = self.halo_documents(left) != 0
        return before.masked_fill(others.view(*others.shape, *[1] * (before.ndim - 2)), 0.0)

    def halo_documents(self, left: int) -> Int[Tensor, "B W"]:
        """For each token of `halo`, 0 if it is in the document of the last of them, else -1."""
        before = self._row[:, max(0, self._begin - left) : self._begin]
        ids = -(before != before[:, -1:]).to(self.documents.dtype)
        return F.pad(ids, (left - ids.shape[1], 0), value=-1)

    def around(
        self, x: Float[Tensor, "B L *rest"], left: int, right: int
    ) -> Float[Tensor, "B W *rest"]:
        """The inputs extended by `left` tokens before and `right` after; zeros beyond the row."""
        wanted = self.spans.widened(left, right)
        wide = fetch(x, self.spans, wanted, self.ranks, "halo")
        begin, end = wanted[self.ranks.rank]
        return _filled(wide, left - (self._begin - begin), right - (end - self._end))

    def documents_around(self, left: int, right: int) -> Int[Tensor, "B W"]:
        """The document id of each token of `around` in the whole row, `PADDING` beyond it."""
        filled = F.pad(self._row, (left, right), value=PADDING)
        return filled[:, self._begin : self._end + left + right]

    def recur(self, outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
        """The outputs of a recurrence, started from the state after the earlier shards.

        Sends the summary of the shard, computes the outputs from a zero state meanwhile, and then
        adds the contribution of the state that the other ranks' summaries give.
        """
        if isinstance(outputs, AssociativeRecurrence):
            return self._join(outputs)
        if not isinstance(outputs, Recurrence):
            raise ValueError(
                "a recurrence is asked to run over ranks, but it can only run from a given state; "
                "implement models.sequences.recurrence.Recurrence for it"
            )
        keep, continues, n_reversed = self._keeps_forward(), self.documents == 0, 0
        if outputs.bidirectional:
            keep = torch.cat([keep, self._keeps_backward()], dim=1)
            continues = torch.cat([continues, self._continues_after().flip(1)])
            n_reversed = len(self.documents)
        carry = Carry(keep, n_reversed, self.ranks, self.scheme)
        # Between publish and before: the outputs from zero overlap with communication.
        token = carry.publish(outputs.summary())
        from_zero = outputs.from_zero()
        carried = outputs.carried(carry.before(token), continues)
        return (from_zero + carried).to(from_zero.dtype)

    def gather(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B S *rest"]:
        """The features of every token up to the last one of this shard."""
        return fetch(x, self.spans, self.spans.up_to(), self.ranks, "gather")

    def convolve(
        self, x: Float[Tensor, "B L E"], taps: Taps, reverse: Taps | None = None
    ) -> Float[Tensor, "B L E"]:
        """Convolve each channel within documents, each rank whole rows of some channels.

        An all-to-all shards the channels instead of the length, and another one undoes it. Every
        rank computes all filters and uses those of its channels.
        """
        rows, E = swap(x, self.spans, self.ranks, "channels"), x.shape[2]
        # The first of this rank's channels, as `shares` in models.ranks.exchange cuts them.
        mine = slice(E * self.ranks.rank // self.ranks.size, None)
        mine = slice(mine.start, mine.start + rows.shape[2])
        T, documents = self.spans.total, self._row if self.packed else None
        back = None if reverse is None else reverse(T)[mine]
        mixed = long_conv(rows, taps(T)[mine], documents, back) if rows.shape[2] else rows
        return swap_back(mixed, E, self.spans, self.ranks, "channels")

    def collect(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        """Features of every `every`-th token of each document up to the end of this shard."""
        index = self._segment_ends(every)
        # Every rank knows all documents, so it knows how many ends each other rank sends.
        ends, rank = Spans(each.shape[1] for each in index), self.ranks.rank
        mine = picked(x, index[rank])
        features = fetch(mine, ends, ends.up_to(), self.ranks, "collect")
        places = [
            picked_places(each, self._row[:, a:b], self._all_positions()[:, a:b])
            for each, (a, b) in zip(index[: rank + 1], self.spans.each, strict=False)
        ]
        documents, positions = (torch.cat(x, dim=1) for x in zip(*places, strict=True))
        return Collected(features, documents, positions)

    def once(self, make: Callable[[], Tensor]) -> Tensor:  # noqa: ARG002
        """Refuse: cross patterns have no sharded form."""
        raise ValueError("a memory has no sharded form, but the sequence is sharded; use 1 rank")

    def _join(self, recurrence: AssociativeRecurrence) -> Tensor:
        """The outputs of an associative recurrence: gather all final states, join the earlier."""
        final, ids, ranks = recurrence.final_state_from_zero(), recurrence.documents, self.ranks
        kept = final.new_ones(len(final)) if ids is None else (ids[:, -1] == 0).to(final)
        # Whether the state before each rank survives it: not if a document begins in its shard.
        keep = [x > 0 for x in ranks.gather(kept, "keep").wait()]
        wanted = [(0, rank) for rank in range(ranks.size)]
        earlier = fetch(final[:, None], Spans([1] * ranks.size), wanted, ranks, "state")
        identity = recurrence.identity(final)
        # The identity is concatenated even on the first rank, which fetches nothing: so its
        # backward pass takes part in the exchange of gradients.
        state, *others = torch.cat([identity[:, None], earlier], dim=1).unbind(dim=1)
        for rank, after in enumerate(others):
            counts = keep[rank].view(-1, *[1] * (final.ndim - 1))
            state = recurrence.join(torch.where(counts, state, identity), after)
        return recurrence(state)[0]

    def _all_positions(self) -> Int[Tensor, "B T"]:
        return self.memo("all positions", lambda: positions_in_documents(self._row))

    def _segment_ends(self, every: int) -> list[Int[Tensor, "B S"]]:
        """The segment ends in each rank's shard."""
        places = self._all_positions()
        return [
            self.memo(
                ("ends", every, a),
                lambda a=a, b=b: segment_ends(self._row[:, a:b], places[:, a:b], every),
            )
            for a, b in self.spans.each
        ]

    def _keeps_forward(self) -> Bool[Tensor, "R B"]:
        """For each rank, whether its last token is in the document of the last token before it."""
        return torch.stack(
            [self._row[:, b - 1] == self._row[:, max(0, a - 1)] for a, b in self.spans.each]
        )

    def _keeps_backward(self) -> Bool[Tensor, "R B"]:
        """For each rank, whether its first token is in the document of the first token after it."""
        last = self.spans.total - 1
        return torch.stack(
            [self._row[:, a] == self._row[:, min(b, last)] for a, b in self.spans.each]
        )

    def _continues_after(self) -> Bool[Tensor, "B L"]:
        """Mark the tokens in the document of the first token after this shard."""
        after = min(self._end, self.spans.total - 1)
        return self.own_documents() == self._row[:, after : after + 1]


def _spans(documents: Int[Tensor, "B L"], ranks: Communicator) -> Spans:
    shape = documents.new_tensor(documents.shape, dtype=torch.int64)
    shapes = torch.stack(ranks.gather(shape, "lengths").wait()).tolist()
    if len({rows for rows, _ in shapes}) > 1 or min(length for _, length in shapes) < 1:
        raise ValueError(
            f"the ranks' shards have {shapes} rows and tokens; give all of them the same number of "
            "rows, and at least 1 token"
        )
    return Spans(length for _, length in shapes)


def _whole_rows(
    documents: Int[Tensor, "B L"], spans: Spans, ranks: Communicator
) -> Int[Tensor, "B T"]:
    longest = max(b - a for a, b in spans.each)
    filled = F.pad(documents, (0, longest - documents.shape[1]))
    everyones = ranks.gather(filled, "documents").wait()
    parts = [x[:, : b - a] for x, (a, b) in zip(everyones, spans.each, strict=True)]
    return torch.cat(parts, dim=1)


def _filled(x: Tensor, left: int, right: int) -> Tensor:
    """Pad the length with zeros."""
    return F.pad(x, (*[0, 0] * (x.ndim - 2), left, right))
