"""Validation batches: the same blocks in the same order for every run of a study."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from streaming.base.format.mds import MDSReader

from data_pipelines import manifest as manifests
from data_pipelines.batch import Batch, join_batches
from data_pipelines.config import DataConfig
from data_pipelines.manifest import read_manifest
from data_pipelines.shards import batch_of, located_errors, open_dataset, open_shards
from data_pipelines.verify import verify_streams
from untrusted.paths import inside


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
    max_blocks: int,
) -> Iterator[Batch]:
    """The first blocks of a held-out set, in their order, cut or joined into sequences.

    Raises:
        ValueError: the config does not fit the dataset, or the blocks make no whole sequence.
        RuntimeError: the dataset is damaged or does not match its manifest.
    """
    folder, manifest = open_dataset(config, root, None)
    described, joined = manifest.stream(domain, split), config.joined_blocks
    verify_streams(folder, manifest, [described])
    read = _whole_groups(config, described, max_blocks) * joined
    blocks = itertools.islice(_in_order(open_shards(folder, described)), read)
    waiting: list[Batch] = []
    while rows := list(itertools.islice(blocks, batch_sequences * joined)):
        waiting.append(batch_of(rows, config, manifest))
        *whole, rest = join_batches(waiting).split(batch_sequences)
        yield from whole
        waiting = [rest]
    yield from waiting


def check_evaluation(config: DataConfig, root: Path, max_blocks: int) -> None:
    """Check that the blocks that are read of every validation set fill at least one sequence.

    Raises:
        ValueError: those of one set do not.
    """
    manifest = read_manifest(inside(root, config.dataset))
    for domain in manifest.domains:
        _whole_groups(config, manifest.stream(domain, "validation"), max_blocks)


def _whole_groups(config: DataConfig, described: manifests.Stream, max_blocks: int) -> int:
    """Groups of joined blocks among the first blocks of a set."""
    joined = config.joined_blocks
    groups = min(max_blocks, described.blocks) // joined
    if joined > 1 and not groups:
        raise ValueError(
            f"{described.folder} of dataset {config.dataset} has {described.blocks} blocks, of "
            f"which evaluation reads {max_blocks}, but corpus.seq_len {config.seq_len} takes "
            f"{joined} for one sequence; raise evaluation.blocks_per_set, or build a longer set"
        )
    return groups


def _in_order(shards: list[MDSReader]) -> Iterator[dict]:
    for shard in shards:
        for place in range(shard.samples):
            with located_errors(shard, place):
                row = shard[place]
            yield row
