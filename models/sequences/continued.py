"""Chunks of a sequence one after another, for prefill and decoding, and the state between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.convolution.online_conv import InputBlock, Taps, extend_blocks
from models.sequences.positions import PADDING, positions_in_documents
from models.sequences.whole import Collected, WholeSequence


class Memory(NamedTuple):
    """The other side of a cross pattern: its features, and the sequence that they belong to."""

    x: Float[Tensor, "B S D"]
    sequence: WholeSequence


@dataclass(frozen=True)
class DecodingState:
    """The decoding state: continuing from it equals running on all tokens seen so far.

    Attributes:
        documents: ids of all tokens seen, counted across chunks.
        position: tokens seen of the last document.
        layers: for each layer, what its calls stored, in call order.
        collected: documents and positions of the tokens that `collect` returned, by `every`.
        padded: whether some rows end in padding.
    """

    documents: Int[Tensor, "B S"]
    position: Int[Tensor, "B 1"]
    layers: tuple[tuple[Tensor, ...], ...]
    collected: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    padded: bool = False

    def bytes(self) -> int:
        """Bytes of the layers' states for all rows, without document ids and positions."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)


class ContinuedSequence(WholeSequence):
    """A chunk of tokens after earlier chunks.

    Args:
        documents: ids of the chunk's documents; 0 continues the document of the last token seen.
        state: the state after the earlier chunks; None for the first.

    Raises:
        ValueError: the ids are out of order, the state has another number of rows, or some of its
            rows end in padding: what a mixer keeps of them is that of the padding.
    """

    def __init__(self, documents: Int[Tensor, "B L"], state: DecodingState | None) -> None:
        super().__init__(documents)
        if state is not None:
            _check_state(state, len(documents))
        self._earlier = state
        seen = None if state is None else state.documents
        # A chunk counts its documents from the last one seen, which is its 0.
        counted = documents
        if seen is not None:
            counted = torch.where(documents == PADDING, PADDING, documents + seen[:, -1:])
        self._all_documents = counted if seen is None else torch.cat([seen, counted], dim=1)
        self.packed = not documents.is_meta and bool(counted[:, -1].any())
        self._incoming: list[Tensor] = []
        self._outgoing: list[Tensor] = []
        self._finished: list[tuple[Tensor, ...]] = []
        self._collected = {} if state is None else dict(state.collected)

    def enter_layer(self) -> None:
        """Begin the next layer: its calls read and store that layer's state."""
        number = len(self._finished)
        self._incoming = [] if self._earlier is None else list(self._earlier.layers[number])
        self._outgoing = []

    def leave_layer(self) -> None:
        """End the layer, and store its state."""
        self._finished.append(tuple(self._outgoing))

    def state(self) -> DecodingState:
        """The state after this chunk."""
        last = self.positions()[:, -1:] + 1
        layers = tuple(self._finished)
        return DecodingState(self._all_documents, last, layers, self._collected, self.padded)

    def positions(self) -> Int[Tensor, "B L"]:
        """The position of each token in its document, earlier chunks included."""
        return self.memo("positions", self._positions)

    def own_documents(self) -> Int[Tensor, "B L"]:
        """The document id of each token, counted from the first chunk."""
        return self._all_documents[:, -self.documents.shape[1] :]

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token seen so far, this chunk included."""
        return self._all_documents

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:
        """The `left` inputs before this chunk; zeros where its document had not begun."""
        before = self._recall()
        if before is None:
            before = x.new_zeros((x.shape[0], left, *x.shape[2:]))
        # A copy: a view would keep the whole chunk alive in the state.
        self._outgoing.append(torch.cat([before, x], dim=1)[:, x.shape[1] :].clone())
        others = self.halo_documents(left) != 0
        return before.masked_fill(others.view(*others.shape, *[1] * (before.ndim - 2)), 0.0)

    def halo_documents(self, left: int) -> Int[Tensor, "B W"]:
        """For each token of `halo`, 0 if the first token continues its document, else -1."""
        # Only the last `known` tokens belong to the document that continues.
        known = torch.zeros_like(self.documents[:, :1]) if self._earlier is None else self._before()
        ago = torch.arange(left, 0, -1, device=self.documents.device)
        return -(ago > known).to(self.documents.dtype)

    def recur(self, outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
        """The outputs of a recurrence, started from the state after the earlier chunks."""
        mixed, final = outputs(self._recall())
        self._outgoing.append(final)
        return mixed

    def gather(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B S *rest"]:
        """The features of every token seen so far, this chunk included."""
        before = self._recall()
        gathered = x if before is None else torch.cat([before, x], dim=1)
        self._outgoing.append(gathered)
        return gathered

    def convolve(
        self, x: Float[Tensor, "B L E"], taps: Taps, reverse: Taps | None = None
    ) -> Float[Tensor, "B L E"]:
        """A causal convolution of each channel within documents, earlier chunks included."""
        assert reverse is None, "a filter of later tokens needs all of them at once"
        known, take = self._incoming, self._incoming.pop
        # The count is taken first: Python evaluates the range before the blocks.
        blocks = [InputBlock(take(0), take(0)) for _ in range(len(take(0)) if known else 0)]
        documents = self.packed_documents
        longest = int(self.positions()[:, -1].max()) + 1 if self.packed else None
        outputs, blocks = extend_blocks(x, taps, blocks, documents, longest)
        # The number of blocks that follow, as the size of an empty tensor: a state holds tensors.
        self._outgoing.append(x.new_empty(len(blocks), 0))
        self._outgoing.extend(tensor for block in blocks for tensor in block)
        return outputs

    def collect(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        """Features of every `every`-th token of each document so far, this chunk included."""
        before = self._recall()
        # The first chunk needs no state; later ones append to the collected tokens.
        if before is None or self._earlier is None:
            new = super().collect(x, every)
            # A copy: a view would keep the whole chunk alive in the state.
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
        """A tensor that is computed in the first chunk and kept, such as a memory's keys."""
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
        # Only document 0 of the chunk began earlier.
        return places + torch.where(self.documents == 0, self._before(), 0)

    def _recall(self) -> Tensor | None:
        return self._incoming.pop(0) if self._incoming else None


def _check_state(state: DecodingState, rows: int) -> None:
    if len(state.documents) != rows:
        raise ValueError(
            f"the chunk has {rows} rows, but the state it continues has {len(state.documents)}; "
            "give one for each"
        )
    if state.padded:
        short = (state.documents[:, -1] == PADDING).nonzero().flatten().tolist()
        raise ValueError(
            f"rows {short} of the state end in padding, from which no chunk can go on; decode rows "
            "of different lengths in separate batches, or pad only the last chunk"
        )
