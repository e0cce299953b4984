"""Smoothed n-gram models of tokens: baselines for trained models.

Interpolated Witten-Bell smoothing (Witten and Bell 1991, method C, in the recursive form of Chen
and Goodman 1999, section 2.6): after a context h that was seen c(h) times with T(h) different
followers, p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)), h' being h without its first
token; the shortest context backs off to the uniform distribution.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipelines.batch import IGNORED, Batch


@dataclass(frozen=True)
class _Counts:
    """Sorted keys of the contexts of one length, and of contexts with a follower."""

    contexts: np.ndarray
    seen: np.ndarray
    followers: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray


class NGram:
    """A model that predicts a token from the `order` - 1 tokens before it in its document.

    Args:
        order: 1 for frequencies alone, 2 for a bigram.
        vocab_size: number of ids.

    Raises:
        ValueError: contexts of this order cannot be numbered in 63 bits.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        if order < 1 or vocab_size ** (order + 1) >= 2**63:
            raise ValueError(
                f"order {order} at {vocab_size} ids is too large: its contexts do not fit into 63 "
                "bits; choose an order from 1 on that does, such as 5 for bytes"
            )
        self.order, self.vocab_size = order, vocab_size
        self._counts: list[_Counts] = []

    def fit(self, batches: Iterable[Batch]) -> "NGram":
        """Count the tokens of sequences, each with what its sequence shows before it."""
        kept = [self._windows(batch) for batch in batches]
        windows, depths = (np.concatenate(part) for part in zip(*kept, strict=True))
        self._counts = [
            self._count(windows[depths >= length], length) for length in range(self.order)
        ]
        return self

    def total_nats(self, batch: Batch) -> float:
        """Summed cross-entropy of the targets of a batch."""
        windows, depths = self._windows(batch)
        chance = np.full(len(windows), 1.0 / self.vocab_size)
        for length, counts in enumerate(self._counts):
            long = depths >= length
            contexts, pairs = self._keys(windows[long], length)
            seen = _look_up(counts.contexts, counts.seen, contexts)
            followers = _look_up(counts.contexts, counts.followers, contexts)
            both = _look_up(counts.pairs, counts.pair_counts, pairs)
            known = np.maximum(seen + followers, 1)
            refined = (both + followers * chance[long]) / known
            chance[long] = np.where(seen > 0, refined, chance[long])
        return float(-np.log(chance).sum())

    def _windows(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Each target after the `order` - 1 tokens before it, and how many of these it may see."""
        tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
        documents = batch.documents.numpy()
        length = tokens.shape[1]
        columns, depth = [], np.zeros(tokens.shape, dtype=np.int64)
        for back in range(self.order - 1):
            moved = np.zeros_like(tokens)
            moved[:, back:] = tokens[:, : length - back]
            same = np.zeros(tokens.shape, dtype=bool)
            same[:, back:] = documents[:, : length - back] == documents[:, back:]
            depth += same
            columns.append(moved)
        columns.reverse()
        wanted = targets != IGNORED
        return np.stack([*columns, targets], axis=-1)[wanted], depth[wanted]

    def _count(self, windows: np.ndarray, length: int) -> _Counts:
        _, pairs = self._keys(windows, length)
        unique_pairs, pair_counts = np.unique(pairs, return_counts=True)
        of_pair = unique_pairs // self.vocab_size
        unique, index = np.unique(of_pair, return_inverse=True)
        seen = np.bincount(index, weights=pair_counts, minlength=len(unique))
        followers = np.bincount(index, minlength=len(unique))
        return _Counts(unique, seen, followers, unique_pairs, pair_counts)

    def _keys(self, windows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        key = np.zeros(len(windows), dtype=np.int64)
        for place in range(self.order - 1 - length, self.order - 1):
            key = key * self.vocab_size + windows[:, place]
        return key, key * self.vocab_size + windows[:, -1]


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not there."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
