"""Positions and document ids of tokens, and picking one token of each row."""

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

PADDING = -1
"""Document id of padding, which is at the end of a row."""


def check_documents(documents: Int[Tensor, "B L"]) -> None:
    """Check that there are tokens, and that each row's documents are in order.

    Raises:
        ValueError: there is no row or token, or an id follows a larger one or padding.
    """
    if documents.ndim != 2 or documents.numel() == 0:
        raise ValueError(
            f"the document ids have shape {tuple(documents.shape)}; a batch has at least 1 row of "
            "at least 1 token"
        )
    if documents.is_meta:
        return
    # Padding, the last of a row, as the largest id.
    ids = documents.masked_fill(documents == PADDING, torch.iinfo(documents.dtype).max)
    wrong = (ids[:, 1:] < ids[:, :-1]).any(dim=1) | (ids[:, 0] < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"the document ids of row {row} are out of order; give ids from 0 that never fall, and "
            f"{PADDING} for padding, which is at the end of a row"
        )


def positions_in_documents(documents: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Count the tokens of each document from 0."""
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    # The index at which each token's document begins: the latest begin so far.
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return index - first


def same_documents(
    queries: Int[Tensor, "B L"], keys: Int[Tensor, "B S"]
) -> Bool[Tensor, "B 1 L S"]:
    """Mark the keys of each query's own document."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def segment_ends(
    documents: Int[Tensor, "B L"], positions: Int[Tensor, "B L"], every: int
) -> Int[Tensor, "B S"]:
    """Index of each token that ends a segment of `every` tokens; rows are padded with -1."""
    ends = ((positions + 1) % every == 0) & (documents != PADDING)
    counts = ends.sum(dim=1)
    # A stable sort of the negated marks puts the marked tokens first, in order.
    index = torch.argsort((~ends).to(torch.int8), dim=1, stable=True)[:, : int(counts.max())]
    filled = torch.arange(index.shape[1], device=index.device) < counts[:, None]
    return torch.where(filled, index, -1)


def picked(x: Num[Tensor, "B L *rest"], index: Int[Tensor, "B S"]) -> Num[Tensor, "B S *rest"]:
    """Select tokens of each row; an index of -1 selects an arbitrary token."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index.clamp(min=0)]


def picked_places(
    index: Int[Tensor, "B S"], documents: Int[Tensor, "B L"], positions: Int[Tensor, "B L"]
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Documents and positions of selected tokens; the document is `PADDING` at an index of -1."""
    return picked(documents, index).masked_fill(index < 0, PADDING), picked(positions, index)
