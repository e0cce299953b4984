"""The tokens at hand, and what a mixer may ask of the tokens that came before them.

A mixer never asks *why* something precedes its tokens. It calls an exchange, and the sequence
object answers: nothing precedes (`WholeSequence`), earlier pieces do (`ContinuedSequence`), and,
once it exists, other ranks do. What each exchange must remember, in call order, is the decoding
state, so forward, any split and any number of ranks are one piece of code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class WholeSequence:
    """Tokens that nothing precedes.

    Args:
        documents: ids of the documents packed into each row, starting at 0 and never falling.
    """

    def __init__(self, documents: Int[Tensor, "B L"]) -> None:
        self.documents = documents
        self.packed = bool(documents[:, -1].any()) if not documents.is_meta else True
        self._memo: dict[object, Tensor] = {}

    def positions(self) -> Int[Tensor, "B L"]:
        """The place of each token in its document."""
        return self.memo("positions", lambda: positions_in_documents(self.documents))

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token that `gather` returns."""
        return self.documents

    def visible(self) -> Bool[Tensor, "B 1 L S"]:
        """Which gathered tokens each token may see: itself and what precedes it in its document."""
        return self.memo("visible", self._visible)

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:  # noqa: ARG002
        """The `left` inputs before the first token, or None where there are none."""
        return None

    def recur(
        self,
        outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The outputs of a recurrence started from the state that the earlier tokens left.

        Args:
            outputs: maps the state before the first token (None for zero) to the outputs and the
                state after the last token.
        """
        return outputs(None)[0]

    def gather(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B S *rest"]:
        """The features of every token that the last one may see, in order."""
        return x

    def memo(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all layers share, made at its first use."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _visible(self) -> Bool[Tensor, "B 1 L S"]:
        return visible_keys(self.documents, self.gathered_documents())


@dataclass(frozen=True)
class DecodingState:
    """What the tokens seen so far leave behind: enough to go on as if they were still there.

    Attributes:
        documents: ids of all tokens seen, counted on from piece to piece.
        layers: for each layer what its exchanges remember, in call order.
    """

    documents: Int[Tensor, "B S"]
    layers: tuple[tuple[Tensor, ...], ...]

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
        self._incoming: list[Tensor] = []
        self._outgoing: list[Tensor] = []
        self._finished: list[tuple[Tensor, ...]] = []

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
        return DecodingState(self._all_documents, tuple(self._finished))

    def positions(self) -> Int[Tensor, "B L"]:
        """The place of each token in its document, counted from the document's first piece."""
        length = self.documents.shape[1]
        return self.memo(
            "positions", lambda: positions_in_documents(self._all_documents)[:, -length:]
        )

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token seen so far, this piece included."""
        return self._all_documents

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:
        """The `left` inputs before this piece; zeros stand where its document had not begun."""
        before = self._recall()
        if before is None or self._earlier is None:
            before = x.new_zeros((x.shape[0], left, *x.shape[2:]))
            self._outgoing.append(torch.cat([before, x], dim=1)[:, x.shape[1] :])
            return before
        self._outgoing.append(torch.cat([before, x], dim=1)[:, x.shape[1] :])
        seen = self._earlier.documents
        known = min(left, seen.shape[1])
        others = torch.zeros(before.shape[:2], dtype=torch.bool, device=before.device)
        others[:, left - known :] = seen[:, seen.shape[1] - known :] != seen[:, -1:]
        return before.masked_fill(others.view(*others.shape, *[1] * (before.ndim - 2)), 0.0)

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

    def _recall(self) -> Tensor | None:
        return self._incoming.pop(0) if self._incoming else None

    def _visible(self) -> Bool[Tensor, "B 1 L S"]:
        length = self.documents.shape[1]
        return visible_keys(self._all_documents[:, -length:], self._all_documents)


def positions_in_documents(documents: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count the tokens of each document from 0."""
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return index - first


def visible_keys(queries: Int[Tensor, "B L"], keys: Int[Tensor, "B S"]) -> Bool[Tensor, "B 1 L S"]:
    """Mark the keys that share a query's document and do not follow it; queries end the keys."""
    L, S = queries.shape[1], keys.shape[1]
    place = torch.arange(S, device=keys.device)
    causal = place[None, :] <= place[S - L :, None]
    same = queries[:, :, None] == keys[:, None, :]
    return (same & causal)[:, None]
