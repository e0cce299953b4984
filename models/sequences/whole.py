"""The interface through which mixers access preceding tokens, and its form for whole sequences.

A mixer is written once. It calls methods such as `halo`, `recur` and `gather` on its sequence,
which supplies what precedes the tokens at hand: nothing (`WholeSequence`), earlier chunks of the
sequence (`ContinuedSequence`, for prefill and decoding) or the shards of earlier ranks
(`models.sequences.sharded.ShardedSequence`). What these calls store is the decoding state.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.convolution.long_conv import long_conv
from kernels.convolution.online_conv import Taps
from models.sequences.positions import (
    PADDING,
    check_documents,
    picked,
    picked_places,
    positions_in_documents,
    same_documents,
    segment_ends,
)


class Collected(NamedTuple):
    """Features of the tokens that end a segment of their document, padded at the end of rows.

    Attributes:
        documents: their document ids; `PADDING` in padding.
        positions: their positions in their documents.
    """

    features: Float[Tensor, "B S *rest"]
    documents: Int[Tensor, "B S"]
    positions: Int[Tensor, "B S"]


class WholeSequence:
    """A batch of complete rows: no tokens precede them.

    Args:
        documents: ids of the documents packed into each row, from 0 and nondecreasing, then
            `PADDING` for the tokens that fill up the row.

    Raises:
        ValueError: there is no row or token, or the ids are out of order.
    """

    def __init__(self, documents: Int[Tensor, "B L"]) -> None:
        check_documents(documents)
        if documents.is_inference():
            with torch.inference_mode(False):
                documents = documents.clone()
        self.documents = documents
        # Meta tensors have no values: count them as one document a row.
        self.packed = not documents.is_meta and bool(documents[:, -1].any())
        self.padded = self.packed and bool((documents[:, -1] == PADDING).any())
        self._memo: dict[object, Tensor] = {}

    @property
    def packed_documents(self) -> Int[Tensor, "B L"] | None:
        """The document id of each token; None if each row is a single document."""
        return self.documents if self.packed else None

    def positions(self) -> Int[Tensor, "B L"]:
        """The position of each token in its document."""
        return self.memo("positions", lambda: positions_in_documents(self.documents))

    def own_documents(self) -> Int[Tensor, "B L"]:
        """The document id of each token, counted from the beginning of the row."""
        return self.documents

    def gathered_documents(self) -> Int[Tensor, "B S"]:
        """The document id of every token that `gather` returns."""
        return self.documents

    def visible(self, *, causal: bool) -> Bool[Tensor, "B 1 L S"]:
        """Which gathered tokens each token may see: those of its document, not later if causal."""
        return self.memo(("visible", causal), lambda: self._visible(causal))

    def without_padding(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "B L *rest"]:
        """The features with zeros in padding; a NaN in padding does not survive."""
        if not self.padded:
            return x
        padding = self.documents == PADDING
        return x.masked_fill(padding.view(*padding.shape, *[1] * (x.ndim - 2)), 0.0)

    def halo(self, x: Float[Tensor, "B L *rest"], left: int) -> Tensor | None:  # noqa: ARG002
        """The `left` inputs before the first token; None if nothing precedes."""
        return None

    def halo_documents(self, left: int) -> Int[Tensor, "B W"] | None:  # noqa: ARG002
        """For each token of `halo`, 0 if the first token continues its document, else -1."""
        return None

    def around(
        self, x: Float[Tensor, "B L *rest"], left: int, right: int
    ) -> Float[Tensor, "B W *rest"]:
        """The inputs extended by `left` tokens before and `right` after; zeros beyond the row."""
        return F.pad(x, (*[0, 0] * (x.ndim - 2), left, right))

    def documents_around(self, left: int, right: int) -> Int[Tensor, "B W"]:
        """The document id of each token of `around`, `PADDING` beyond the row."""
        return F.pad(self.documents, (left, right), value=PADDING)

    def recur(
        self,
        outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The outputs of a recurrence, started from the state after the preceding tokens.

        Args:
            outputs: maps the state before the first token (None for zero) to the outputs and the
                state after the last token. Sharded sequences need a
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
        L, documents = x.shape[1], self.packed_documents
        return long_conv(x, taps(L), documents, None if reverse is None else reverse(L))

    def collect(self, x: Float[Tensor, "B L *rest"], every: int) -> Collected:
        """Features of every `every`-th token of each document, the last of each whole segment."""
        if not self.packed:
            features = x[:, every - 1 :: every]
            ends = torch.arange(features.shape[1], device=x.device).expand(features.shape[:2])
            return Collected(features, torch.zeros_like(ends), ends * every + every - 1)
        return self._collect_ends(x, every)

    def once(self, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is computed in the first chunk and kept, such as a memory's keys."""
        return make()

    def memo(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all layers share, computed at its first use."""
        if key not in self._memo:
            # What inference mode makes cannot be saved for a backward pass, if training comes next.
            # A compiler cannot trace the question; compiled blocks are for training.
            compiling = torch.compiler.is_compiling()
            inference = not compiling and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
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


def visible_memory(
    queries: Int[Tensor, "B L"], keys: Int[Tensor, "B S"]
) -> Bool[Tensor, "B 1 L S"]:
    """Mark the tokens of a memory that each query may see: those of its own document.

    A query without any, such as padding, is shown all of them: a softmax over nothing would be NaN.
    Its output is not used.
    """
    same = same_documents(queries, keys) & (keys != PADDING)[:, None, None, :]
    return same | ~same.any(dim=-1, keepdim=True)


def _not_later(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "L S"]:
    place = torch.arange(keys, device=device)
    # The queries are the last of the keys.
    return place[None, :] <= place[keys - queries :, None]
