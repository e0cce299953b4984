"""A batch of training sequences, and the 64-bit mixing that gives samples their ids."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100
"""Target of a position whose next token belongs to another document."""
PADDING = -1
"""Document of what fills up a row."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Batch:
    """Sequences with their next tokens and documents.

    Attributes:
        tokens: ids.
        targets: the next token of the same document, `IGNORED` where there is none.
        documents: document of each token, counted from 0 in each sequence.
        samples: id of each sequence (B,), the same wherever and whenever it is read.
        source: ids of what an encoder reads, with `source_documents`; None without an encoder.
    """

    tokens: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    documents: Int[Tensor, "B L"]
    samples: np.ndarray
    source: Int[Tensor, "B S"] | None = None
    source_documents: Int[Tensor, "B S"] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def split(self, sequences: int) -> Iterator["Batch"]:
        """Consecutive parts of that many sequences; the last one may have fewer."""
        for begin in range(0, len(self), sequences):
            part = slice(begin, begin + sequences)
            yield Batch(
                self.tokens[part],
                self.targets[part],
                self.documents[part],
                self.samples[part],
                None if self.source is None else self.source[part],
                None if self.source_documents is None else self.source_documents[part],
            )

    def stretch(self, part: int, parts: int) -> "Batch":
        """One of `parts` stretches of every sequence, nearly equal; documents keep their ids."""
        L = self.tokens.shape[1]
        along = slice(part * L // parts, (part + 1) * L // parts)
        assert self.source is None, "a source has a length of its own"
        return Batch(
            self.tokens[:, along], self.targets[:, along], self.documents[:, along], self.samples
        )


def cut_blocks(
    tokens: np.ndarray, documents: np.ndarray, samples: np.ndarray, seq_len: int
) -> Batch:
    """Cut blocks of T + 1 tokens into the T / seq_len sequences of each, in order.

    Args:
        tokens: (blocks, T + 1); the last token is the target of the one before it.
        documents: (blocks, T + 1), rising within a block.
        samples: id of each block.
        seq_len: a divisor of T.
    """
    length = tokens.shape[1] - 1
    pieces = length // seq_len
    inputs, following = tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64)
    targets = np.where(documents[:, 1:] == documents[:, :-1], following, IGNORED)
    local = documents[:, :-1].astype(np.int32).reshape(-1, seq_len)
    ids = mix(np.repeat(samples, pieces), np.tile(np.arange(pieces), len(samples)))
    return Batch(
        torch.from_numpy(inputs.reshape(-1, seq_len)),
        torch.from_numpy(targets.reshape(-1, seq_len)),
        torch.from_numpy(local - local[:, :1]),
        ids,
    )


def join_blocks(
    tokens: np.ndarray, documents: np.ndarray, samples: np.ndarray, joined: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of `joined` times the length, each made of blocks that follow each other in a domain.

    Args:
        tokens: (blocks, T + 1); a block's last token is the first of the one after it.
        documents: (blocks, T + 1), counted from 0 in each block.
        samples: id of each block.
        joined: blocks that become one, a divisor of their number.
    """
    blocks, width = tokens.shape
    groups = (blocks // joined, joined)
    before = documents[:, -1].astype(np.int64).reshape(groups).cumsum(axis=1)
    shift = np.concatenate([np.zeros((groups[0], 1), np.int64), before[:, :-1]], axis=1)
    counted = documents.reshape(*groups, width) + shift[..., None]
    ids = functools.reduce(mix, samples.reshape(groups).T)
    return _chain(tokens.reshape(*groups, width)), _chain(counted), ids


def join_batches(batches: list[Batch]) -> Batch:
    """One batch with the sequences of all."""
    return Batch(
        torch.cat([b.tokens for b in batches]),
        torch.cat([b.targets for b in batches]),
        torch.cat([b.documents for b in batches]),
        np.concatenate([b.samples for b in batches]),
    )


def target_bytes(batch: Batch, byte_lengths: np.ndarray) -> int:
    """UTF-8 bytes that the targets of a batch stand for."""
    targets = batch.targets.numpy()
    return int(byte_lengths[targets[targets != IGNORED]].sum())


def mix(left: np.ndarray | int, right: np.ndarray | int) -> np.ndarray:
    """Hash two 64-bit numbers into one, elementwise (the finalizer of splitmix64, twice)."""
    return _finalize(_finalize(_unsigned(left)) ^ _unsigned(right))


def _chain(blocks: np.ndarray) -> np.ndarray:
    """(groups, joined, T + 1) to (groups, joined x T + 1)."""
    body = blocks[:, :, :-1].reshape(len(blocks), -1)
    return np.concatenate([body, blocks[:, -1, -1:]], axis=1)


def _finalize(value: np.ndarray) -> np.ndarray:
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * _FIRST
    value = (value ^ (value >> np.uint64(27))) * _SECOND
    return value ^ (value >> np.uint64(31))


def _unsigned(value: np.ndarray | int) -> np.ndarray:
    # One-dimensional: numpy warns of overflow for scalars, and wraps silently for arrays.
    return np.atleast_1d(np.asarray(value)).astype(np.uint64)
