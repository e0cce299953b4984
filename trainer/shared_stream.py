"""Batches under sequence parallelism: the first rank of a group reads and broadcasts them."""

from collections.abc import Iterator

import numpy as np
import torch

from data_pipelines.batch import Batch
from data_pipelines.stream import TokenStream
from trainer.parallel import Ranks


def shared_batches(
    stream: TokenStream | None, ranks: Ranks, shape: tuple[int, int]
) -> Iterator[Batch]:
    """This rank's sequences, whole, read once for each sequence group.

    Args:
        stream: what the group's first rank reads; the others have none.
        ranks: this process among those of the run.
        shape: sequences of a batch and their tokens.
    """
    if ranks.sequence is None:
        assert stream is not None
        yield from stream
        return
    source = None if stream is None else iter(stream)
    while True:
        buffer = _packed(next(source)) if source is not None else _room(shape)
        yield _unpacked(ranks.broadcast(buffer), shape)


def _packed(batch: Batch) -> torch.Tensor:
    """Everything in one row of 64-bit numbers, so that one broadcast is enough."""
    samples = torch.from_numpy(batch.samples.view(np.int64))
    parts = (batch.tokens, batch.targets, batch.documents, samples)
    return torch.cat([part.flatten().to(torch.int64) for part in parts])


def _room(shape: tuple[int, int]) -> torch.Tensor:
    B, L = shape
    return torch.empty(B * (3 * L + 1), dtype=torch.int64)


def _unpacked(buffer: torch.Tensor, shape: tuple[int, int]) -> Batch:
    B, L = shape
    features, samples = buffer[: 3 * B * L].view(3, B, L), buffer[3 * B * L :]
    tokens, targets, documents = features
    return Batch(tokens, targets, documents.to(torch.int32), samples.numpy().view(np.uint64))
