"""Documents of a batch, bucketed by length, for mixers that need whole documents at once.

A bucket's documents are padded to the longest, at most to twice their length: work and memory stay
linear in the tokens however rows are packed, and no sum runs across documents.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kernels.precision import widened
from models.sequences.positions import PADDING
from models.sequences.whole import WholeSequence


class DocumentRows(NamedTuple):
    """One bucket: documents padded at their ends. Without `index`, each document is a whole row.

    Attributes:
        index: index of each token in the flattened batch.
        present: False in padding.
        rows: the row that holds each document.
        ids: the id of each document in its row.
    """

    index: Int[Tensor, "N T"] | None = None
    present: Bool[Tensor, "N T"] | None = None
    rows: Int[Tensor, "N"] | None = None
    ids: Int[Tensor, "N"] | None = None

    def take(self, x: Float[Tensor, "B L *rest"]) -> Float[Tensor, "N T *rest"]:
        """Gather the documents, with zeros in padding."""
        if self.index is None:
            return x
        return self.where_present(x.flatten(0, 1)[self.index], 0.0)

    def where_present(self, x: Num[Tensor, "N T *rest"], value: float | int) -> Tensor:
        """The features, with `value` in padding."""
        if self.present is None:
            return x
        shape = (*self.present.shape, *[1] * (x.ndim - 2))
        return x.masked_fill(~self.present.view(shape), value)

    def lengths(self, x: Float[Tensor, "N T *rest"]) -> Int[Tensor, "N"]:
        """Number of tokens of each document in `x`."""
        if self.present is None:
            return torch.full(x.shape[:1], x.shape[1], device=x.device)
        return self.present.sum(dim=1)

    def look_up(self, table: Float[Tensor, "B D *rest"]) -> Float[Tensor, "N *rest"]:
        """The table entry of each document; zero if the table has none."""
        if self.rows is None or self.ids is None:
            return table[:, 0]
        # Clamped for the lookup; entries beyond the table are zeroed below.
        found = table[self.rows, self.ids.clamp(max=table.shape[1] - 1)]
        missing = self.ids >= table.shape[1]
        return found.masked_fill(missing.view(-1, *[1] * (found.ndim - 1)), 0.0)


def documents_by_length(sequence: WholeSequence) -> list[DocumentRows]:
    """Bucket the documents of a batch by length, without padding."""
    if not sequence.packed:
        return [DocumentRows()]
    places = sequence.memo("documents", lambda: _places(sequence.own_documents()))
    first, length, rows, ids = places.unbind(dim=1)
    # Lengths in a bucket lie between consecutive powers of two.
    size = torch.ceil(torch.log2(length.double()))
    buckets = []
    for each in size.unique().tolist():
        chosen = size == each
        begin, n = first[chosen, None], length[chosen, None]
        offset = torch.arange(int(n.max()), device=n.device)
        present = offset < n
        # Padding points to the document's first token, a valid index; `take` zeroes it.
        index = begin + torch.where(present, offset, 0)
        buckets.append(DocumentRows(index, present, rows[chosen], ids[chosen]))
    return buckets


def put_back(
    parts: list[Tensor], buckets: list[DocumentRows], sequence: WholeSequence
) -> Float[Tensor, "B L *rest"]:
    """Scatter features of documents (N, T, *rest) to their rows, with zeros in padding."""
    if buckets[0].index is None:
        return parts[0]
    shape, parts = sequence.documents.shape, _of_one_dtype(parts)
    out = parts[0].new_zeros((shape.numel(), *parts[0].shape[2:]))
    for part, bucket in zip(parts, buckets, strict=True):
        assert bucket.index is not None
        assert bucket.present is not None
        out = out.index_put((bucket.index[bucket.present],), part[bucket.present])
    return out.unflatten(0, shape)


def tabulate(
    parts: list[Tensor], buckets: list[DocumentRows], sequence: WholeSequence
) -> Float[Tensor, "B D *rest"]:
    """Arrange one entry per document (N, *rest) in a table indexed by row and document id."""
    if buckets[0].rows is None:
        return parts[0][:, None]
    ids, parts = sequence.own_documents(), _of_one_dtype(parts)
    table = parts[0].new_zeros((ids.shape[0], int(ids.max()) + 1, *parts[0].shape[1:]))
    for part, bucket in zip(parts, buckets, strict=True):
        assert bucket.rows is not None
        assert bucket.ids is not None
        table = table.index_put((bucket.rows, bucket.ids), part)
    return table


class Landmarks(NamedTuple):
    """Landmarks: the means of equal segments of a document.

    Attributes:
        present: which landmarks each document has; a document shorter than the number of landmarks
            has one per token. None for all.
    """

    means: Float[Tensor, "N C H P"]
    present: Bool[Tensor, "N C"] | None


def landmarks_of(x: Float[Tensor, "N T H P"], bucket: DocumentRows, count: int) -> Landmarks:
    """Average `count` segments of each document, equal in length up to one token, in float32.

    Segment c of n tokens begins at token floor(c n / count).
    """
    T = x.shape[1]
    if bucket.present is None:
        count = min(count, T)
    length = bucket.lengths(x)[:, None]
    segments = length.clamp(max=count)
    place = torch.arange(count, device=x.device)
    # Segment sizes differ by at most one token, so a gather of the longest with a mask covers all.
    begin = place * length // segments
    size = (place + 1) * length // segments - begin
    offset = torch.arange(-(-T // count), device=x.device)
    index = begin[:, :, None] + offset
    inside = (offset < size[:, :, None]) & (place < segments)[:, :, None]
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    taken = widened(x)[rows, index.clamp(max=T - 1)]  # (N, C, W, H, P)
    taken = taken.masked_fill(~inside[..., None, None], 0.0)
    means = taken.sum(dim=2) / size.clamp(min=1)[:, :, None, None]
    return Landmarks(means, None if bucket.present is None else place < segments)


def _of_one_dtype(parts: list[Tensor]) -> list[Tensor]:
    """The parts in the widest of their dtypes: under autocast it can depend on the length."""
    widest = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return [part.to(widest) for part in parts]


def _places(ids: Int[Tensor, "B L"]) -> Int[Tensor, "N 4"]:
    """For each document: index of its first token in the flattened batch, length, row and id."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    row, column = begins.nonzero(as_tuple=True)
    first = row * ids.shape[1] + column
    end = torch.cat([first[1:], first.new_tensor([ids.numel()])])
    places = torch.stack([first, end - first, row, ids[row, column].to(first.dtype)], dim=1)
    return places[places[:, 3] != PADDING]


def by_document(
    tensors: tuple[Float[Tensor, "B L ..."], ...],
    sequence: WholeSequence,
    mix: Callable[..., Float[Tensor, "N T H P"]],
) -> Float[Tensor, "B L H P"]:
    """Run `mix` on each bucket of documents, padded with zeros.

    Args:
        tensors: features of the tokens, which `mix` gets by document.
        sequence: the documents.
        mix: maps features of N documents to features of the same; outputs in padding are dropped.
    """
    buckets = documents_by_length(sequence)
    parts = [mix(*(bucket.take(x) for x in tensors)) for bucket in buckets]
    return put_back(parts, buckets, sequence)
