"""Validation batches: the same blocks in the same order for every run of a study."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines import manifest as manifests
from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.manifest import read_manifest
from data_pipelines.shards import CheckedShard, batch_of, located_errors, open_dataset, open_shards
from data_pipelines.verify import verify_streams
from untrusted.paths import inside


@dataclass(frozen=True)
class HeldOut:
    """Sequences of a held-out set, and where in it they lie.

    Attributes:
        first_documents: the document that each sequence begins in (B,), counted over all that is
            read; a document that goes on across skipped blocks counts once on each side.
        groups: the group of joined blocks that each sequence is from (B,), counted in the set.
    """

    batch: Batch
    first_documents: np.ndarray
    groups: np.ndarray

    def split(self, sequences: int) -> Iterator["HeldOut"]:
        """Consecutive parts of that many sequences; the last one may have fewer."""
        for i, batch in enumerate(self.batch.split(sequences)):
            part = slice(i * sequences, (i + 1) * sequences)
            yield HeldOut(batch, self.first_documents[part], self.groups[part])


def evaluation_sets(root: Path, dataset: str) -> list[str]:
    """Names of the evaluation sets of a dataset: its domains."""
    return read_manifest(inside(root, dataset)).domains


def evaluation_batches(
    config: DataConfig,
    root: Path,
    domain: str,
    *,
    split: str = "validation",
    batch_sequences: int,
    max_blocks: int | None,
) -> Iterator[Batch]:
    """Blocks spread evenly over a held-out set, in their order, cut or joined into sequences.

    Raises:
        ValueError: the config does not fit the dataset, or the blocks make no whole sequence.
        RuntimeError: the dataset is damaged or does not match its manifest.
    """
    described = read_manifest(inside(root, config.dataset)).stream(domain, split)
    groups = spread_groups(config, described, max_blocks)
    for each in held_out(config, root, described, groups, batch_sequences):
        yield each.batch


def held_out(
    config: DataConfig,
    root: Path,
    described: manifests.Stream,
    groups: Sequence[int],
    batch_sequences: int,
) -> Iterator[HeldOut]:
    """The sequences of some groups of joined blocks of a held-out set, in their order.

    Args:
        config: of the run.
        root: folder of the datasets.
        described: the set's stream.
        groups: rising numbers of the groups.
        batch_sequences: sequences at once.

    Raises:
        ValueError: the config does not fit the dataset.
        RuntimeError: the dataset is damaged or does not match its manifest.
    """
    folder, manifest = open_dataset(config, root, None)
    verify_streams(folder, manifest, [described])
    shards, joined = open_shards(folder, described), config.joined_blocks
    counter = _DocumentCounter()
    for begin in range(0, len(groups), batch_sequences):
        chosen = list(groups[begin : begin + batch_sequences])
        rows = [
            _read(shards, block)
            for group in chosen
            for block in range(group * joined, (group + 1) * joined)
        ]
        firsts = [
            counter.first(group, rows[place * joined : (place + 1) * joined])
            for place, group in enumerate(chosen)
        ]
        # A block that is cut begins in the document of its own first token, piece by piece.
        within = np.stack([row["documents"][: -1 : config.seq_len] for row in rows[::joined]])
        yield from HeldOut(
            batch_of(rows, config, manifest),
            (np.array(firsts)[:, None] + within.astype(np.int64)).ravel(),
            np.repeat(chosen, within.shape[1]),
        ).split(batch_sequences)


def spread_groups(
    config: DataConfig, described: manifests.Stream, max_blocks: int | None
) -> list[int]:
    """Groups of joined blocks, at most as many blocks as asked, evenly over the whole set.

    Raises:
        ValueError: the blocks do not make one group.
    """
    joined = config.joined_blocks
    most = described.blocks if max_blocks is None else min(max_blocks, described.blocks)
    if not most // joined:
        raise ValueError(
            f"{described.folder} of dataset {config.dataset} has {described.blocks} blocks, of "
            f"which evaluation reads {most}, but corpus.seq_len {config.seq_len} takes "
            f"{joined} for one sequence; raise evaluation.blocks_per_set, or build a longer set"
        )
    return spread(list(range(described.blocks // joined)), most // joined)


def spread(items: Sequence[int], count: int) -> list[int]:
    """That many of some items, at equal distances; all of them if there are no more."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def check_evaluation(config: DataConfig, root: Path, max_blocks: int | None) -> None:
    """Check that the blocks that are read of every validation set fill at least one sequence.

    Raises:
        ValueError: those of one set do not.
    """
    manifest = read_manifest(inside(root, config.dataset))
    for domain in manifest.domains:
        spread_groups(config, manifest.stream(domain, "validation"), max_blocks)


class _DocumentCounter:
    """Numbers the documents of groups of blocks that are read one after the other."""

    def __init__(self) -> None:
        self._group, self._last = -1, -1

    def first(self, group: int, rows: Sequence[dict]) -> int:
        """The number of the document that a group begins in."""
        # A block's last token is the first of the next block, and in the same document.
        goes_on = self._last >= 0 and group == self._group + 1
        first = self._last if goes_on else self._last + 1
        self._group = group
        self._last = first + sum(int(row["documents"][-1]) for row in rows)
        return first


def _read(shards: list[CheckedShard], block: int) -> dict:
    for shard in shards:
        if block < shard.samples:
            with located_errors(shard, block):
                return shard[block]
        block -= shard.samples
    raise RuntimeError(
        "the manifest counts more blocks than its shards hold; check the dataset with "
        "launch/sweep.py SWEEP --verify"
    )
