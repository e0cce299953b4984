"""The tokens at hand, and what a mixer may ask of the tokens that came before them.

A mixer never asks *why* something precedes its tokens. It calls an exchange, and the sequence
object answers: nothing precedes (`WholeSequence`), earlier pieces do (`ContinuedSequence`), or the
tokens of other ranks do (`models.sequences.sharded.ShardedSequence`). What each exchange must
remember, in call order, is the decoding state, so forward, any split and any number of ranks are
one piece of code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kernels.long_conv import long_conv
from kernels.online_conv import Block, Taps, extend_blocks

PADDING = -1
"""Document id of tokens that fill up a row; they stand at its end."""


class Collected(NamedTuple):
    """Features of the tokens that end a segment of their document, the rows filled up at the end.

    Attributes:
        documents: their document ids, `PADDING` where a row has no more.
        positions: their places in their documents.
    """

    features: Float[Tensor, "B S *rest"]
    documents: Int[Tensor, "B S"]
    positions: Int[Tensor, "B S"]


class WholeSequence:
    """Tokens that nothing precedes.

    Args:
        documents: ids of the documents packed into each row, starting at 0 and never falling, then
            `PADDING` where the row is filled up.
    """

    def __init__(self, documents: Int[Tensor, "B L"]) -> None:
        self.documents = documents
        # On the meta device there is nothing to look at: its sequences hold one document a row.
        self.packed = not documents.is_meta and bool(documents[:, -1].any())
        self.padded = self.packed and bool((documents[:, -1] == PADDING).any())
        self._memo: dict[object, Tensor] = {}

    def positions(self) -> Int[Tensor, "B L"]:
        """The place of each token in its document."""
        return self.memo("positions", lambda: positions_in_documents(self.documents))

    def own_documents(self) -> Int[Tensor, "B L"]:
        """The document id of each token, counted from the first piece."""
        return self.documents

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token that `gather` returns."""
        return self.documents

    def visible(self, *, causal: bool) -> Bool[Tensor, "B 1 L S"]:
        """Which gathered tokens each token may see: those of its document, not later if causal."""
        return self.memo(("visible", causal), lambda: self._visible(causal))

    def without_padding(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B L *rest"]:
        """The features with zeros in padding, whatever stood there."""
        if not self.padded:
            return x
        padding = self.documents == PADDING
        return x.masked_fill(padding.view(*padding.shape, *[1] * (x.ndim - 2)), 0.0)

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:  # noqa: ARG002
        """The `left` inputs before the first token, or None where there are none."""
        return None

    def halo_documents(self, left: int) -> Int[Tensor, "B W"] | None:  # noqa: ARG002
        """For each token of `halo`, 0 if the first token goes on with its document, else -1."""
        return None

    def around(
        self, x: Float[Tensor, "B L *rest"], left: int, right: int
    ) -> Float[Tensor, "B W *rest"]:
        """The inputs with those of so many tokens before and after; zeros beyond the row."""
        return F.pad(x, (*[0, 0] * (x.ndim - 2), left, right))

    def documents_around(self, left: int, right: int) -> Int[Tensor, "B W"]:
        """The document id of each token of `around`, `PADDING` beyond the row."""
        return F.pad(self.documents, (left, right), value=PADDING)

    def recur(
        self,
        outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The outputs of a recurrence started from the state that the earlier tokens left.

        Args:
            outputs: maps the state before the first token (None for zero) to the outputs and the
                state after the last token. Over ranks it is a
                `models.sequences.recurrence.Recurrence`.
        """
        return outputs(None)[0]

    def gather(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B S *rest"]:
        """The features of every token that the last one may see, in order."""
        return x

    def convolve(
        self, x: Float[Tensor, "B L E"], taps: Taps, reverse: Taps | None = None
    ) -> Float[Tensor, "B L E"]:
        """Each channel's sum of filter[t - s] x[s] over its document's tokens s <= t.

        Args:
            x: the inputs.
            taps: gives the filter's first taps, as many as asked for or fewer where it ends.
            reverse: the same for the tokens s > t, that of s = t + 1 first.
        """
        L, documents = x.shape[1], self.documents if self.packed else None
        return long_conv(x, taps(L), documents, None if reverse is None else reverse(L))

    def collect(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        """Features of every `every`-th token of each document, the last of each whole segment."""
        if not self.packed:
            features = x[:, every - 1 :: every]
            ends = torch.arange(features.shape[1], device=x.device).expand(features.shape[:2])
            return Collected(features, torch.zeros_like(ends), ends * every + every - 1)
        return self._collect_ends(x, every)

    def once(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that the first piece makes and later ones keep, such as a memory's keys."""
        return make()

    def memo(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all layers share, made at its first use."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _collect_ends(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        documents, places = self.own_documents(), self.positions()
        key = ("ends", every)
        index = self.memo(key, lambda: segment_ends(self.documents, places, every))
        return Collected(picked(x, index), *picked_places(index, documents, places))

    def _visible(self, causal: bool) -> Bool[Tensor, "B 1 L S"]:
        same = same_documents(self.own_documents(), self.gathered_documents())
        return same & _not_later(same.shape[2], same.shape[3], same.device) if causal else same


class Memory(NamedTuple):
    """The other side of a cross pattern: its features, and the sequence that they belong to."""

    x: Float[Tensor, "B S D"]
    sequence: WholeSequence


@dataclass(frozen=True)
class DecodingState:
    """What the tokens seen so far leave behind: enough to go on as if they were still there.

    Attributes:
        documents: ids of all tokens seen, counted on from piece to piece.
        position: tokens seen of the last document.
        layers: for each layer what its exchanges remember, in call order.
        collected: documents and positions of the tokens that `collect` has returned, by distance.
    """

    documents: Int[Tensor, "B S"]
    position: Int[Tensor, "B 1"]
    layers: tuple[tuple[Tensor, ...], ...]
    collected: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bytes(self) -> int:
        """Bytes held for all rows of the batch, token bookkeeping left out."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class ContinuedSequence(WholeSequence):
    """Tokens that earlier pieces precede.

    Args:
        documents: ids of the piece's documents; 0 continues the document of the last token seen.
        state: what the earlier pieces left, or None at the very beginning.
    """

    def __init__(self, documents: Int[Tensor, "B L"], state: DecodingState | None) -> None:
        super().__init__(documents)
        self._earlier = state
        seen = None if state is None else state.documents
        counted = documents if seen is None else documents + seen[:, -1:]
        self._all_documents = counted if seen is None else torch.cat([seen, counted], dim=1)
        self.packed = not documents.is_meta and bool(counted[:, -1].any())
        self._incoming: list[Tensor] = []
        self._outgoing: list[Tensor] = []
        self._finished: list[tuple[Tensor, ...]] = []
        self._collected = {} if state is None else dict(state.collected)

    def enter_layer(self) -> None:
        """Say that the exchanges of the next layer follow."""
        number = len(self._finished)
        self._incoming = [] if self._earlier is None else list(self._earlier.layers[number])
        self._outgoing = []

    def leave_layer(self) -> None:
        """Say that the exchanges of this layer are complete."""
        self._finished.append(tuple(self._outgoing))

    def state(self) -> DecodingState:
        """What this piece leaves to the next one."""
        last = self.positions()[:, -1:] + 1
        return DecodingState(self._all_documents, last, tuple(self._finished), self._collected)

    def positions(self) -> Int[Tensor, "B L"]:
        """The place of each token in its document, counted from the document's first piece."""
        return self.memo("positions", self._positions)

    def own_documents(self) -> Int[Tensor, "B L"]:
        """The document id of each token, counted from the first piece."""
        return self._all_documents[:, -self.documents.shape[1] :]

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token seen so far, this piece included."""
        return self._all_documents

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:
        """The `left` inputs before this piece; zeros stand where its document had not begun."""
        before = self._recall()
        if before is None:
            before = x.new_zeros((x.shape[0], left, *x.shape[2:]))
        # A copy: a view would keep the whole piece alive in the state.
        self._outgoing.append(torch.cat([before, x], dim=1)[:, x.shape[1] :].clone())
        others = self.halo_documents(left) != 0
        return before.masked_fill(others.view(*others.shape, *[1] * (before.ndim - 2)), 0.0)

    def halo_documents(self, left: int) -> Int[Tensor, "B W"]:
        """For each token of `halo`, 0 if the first token goes on with its document, else -1."""
        known = torch.zeros_like(self.documents[:, :1]) if self._earlier is None else self._before()
        ago = torch.arange(left, 0, -1, device=self.documents.device)
        return -(ago > known).to(self.documents.dtype)

    def recur(self, outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
        """The outputs of a recurrence started from the state that the earlier pieces left."""
        mixed, final = outputs(self._recall())
        self._outgoing.append(final)
        return mixed

    def gather(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B S *rest"]:
        """The features of every token seen so far, this piece included."""
        before = self._recall()
        gathered = x if before is None else torch.cat([before, x], dim=1)
        self._outgoing.append(gathered)
        return gathered

    def convolve(
        self, x: Float[Tensor, "B L E"], taps: Taps, reverse: Taps | None = None
    ) -> Float[Tensor, "B L E"]:
        """Each channel's sum over the tokens of its document, those of earlier pieces included."""
        assert reverse is None, "a filter of later tokens needs all of them at once"
        known, take = self._incoming, self._incoming.pop
        blocks = [Block(take(0), take(0)) for _ in range(len(take(0)) if known else 0)]
        documents = self.documents if self.packed else None
        longest = int(self.positions()[:, -1].max()) + 1 if self.packed else None
        outputs, blocks = extend_blocks(x, taps, blocks, documents, longest)
        # How many blocks follow: a tensor without elements, because a state holds tensors alone.
        self._outgoing.append(x.new_empty(len(blocks), 0))
        self._outgoing.extend(tensor for block in blocks for tensor in block)
        return outputs

    def collect(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        """Features of every `every`-th token of each document seen so far, this piece included."""
        before = self._recall()
        if before is None or self._earlier is None:
            new = super().collect(x, every)
            # A copy: a view would keep the whole piece alive in the state.
            new = new._replace(features=new.features.clone())
        else:
            new = self._collect_ends(x, every)
            documents, positions = self._earlier.collected[every]
            new = Collected(
                torch.cat([before, new.features], dim=1),
                torch.cat([documents, new.documents], dim=1),
                torch.cat([positions, new.positions], dim=1),
            )
        self._outgoing.append(new.features)
        self._collected[every] = (new.documents, new.positions)
        return new

    def once(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that the first piece makes and later ones keep, such as a memory's keys."""
        before = self._recall()
        kept = make() if before is None else before
        self._outgoing.append(kept)
        return kept

    def _before(self) -> Int[Tensor, "B 1"]:
        assert self._earlier is not None
        return self._earlier.position

    def _positions(self) -> Int[Tensor, "B L"]:
        places = positions_in_documents(self.documents)
        if self._earlier is None:
            return places
        return places + torch.where(self.documents == 0, self._before(), 0)

    def _recall(self) -> Tensor | None:
        return self._incoming.pop(0) if self._incoming else None


def positions_in_documents(documents: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count the tokens of each document from 0."""
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return index - first


def same_documents(
    queries: Int[Tensor, "B L"], keys: Int[Tensor, "B S"]
) -> Bool[Tensor, "B 1 L S"]:
    """Mark the keys of each query's own document."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def visible_memory(
    queries: Int[Tensor, "B L"], keys: Int[Tensor, "B S"]
) -> Bool[Tensor, "B 1 L S"]:
    """Mark the tokens of a memory that each query may see: those of its own document.

    A query whose document has none there, such as one in padding, sees all, so that no row is
    empty; what becomes of it counts nowhere.
    """
    same = same_documents(queries, keys) & (keys != PADDING)[:, None, None, :]
    return same | ~same.any(dim=-1, keepdim=True)


def segment_ends(
    documents: Int[Tensor, "B L"], positions: Int[Tensor, "B L"], every: int
) -> Int[Tensor, "B S"]:
    """Index of each token that ends a whole segment of its document; -1 fills up the rows."""
    ends = ((positions + 1) % every == 0) & (documents != PADDING)
    counts = ends.sum(dim=1)
    index = torch.argsort((~ends).to(torch.int8), dim=1, stable=True)[:, : int(counts.max())]
    filled = torch.arange(index.shape[1], device=index.device) < counts[:, None]
    return torch.where(filled, index, -1)


def picked(x: Num[Tensor, "B L *rest"], index: Int[Tensor, "B S"]) -> Num[Tensor, "B S *rest"]:
    """The features of some tokens of each row; of any token at -1."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index.clamp(min=0)]


def picked_places(
    index: Int[Tensor, "B S"], documents: Int[Tensor, "B L"], positions: Int[Tensor, "B L"]
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Documents and positions of some tokens of each row; `PADDING` at -1."""
    return picked(documents, index).masked_fill(index < 0, PADDING), picked(positions, index)


def _not_later(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "L S"]:
    place = torch.arange(keys, device=device)
    return place[None, :] <= place[keys - queries :, None]
