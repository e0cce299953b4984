"""The batches of one rank, in a global order that can be resumed at any step.

The global order of blocks is a function of the DataConfig and the dataset alone. With b blocks per
step, step s takes blocks s x b to (s + 1) x b, across epochs, and rank r of R takes the r-th part.
So the global batch is the same, in the same order, for any number of ranks and after any
interruption. Where a sequence is longer than a block, groups of consecutive blocks of one shard are
ordered instead; the few blocks at the end of a shard that do not fill a group are left out. What is
rounded off a domain's share in one epoch is carried to the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.spanner import Spanner
from streaming.base.world import World

from data_pipelines import manifest as manifests
from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.manifest import Manifest
from data_pipelines.shards import CheckedShard, batch_of, located_errors, open_dataset, open_shards
from data_pipelines.shares import Apportionment, unique_blocks
from data_pipelines.verify import verify_streams

SAMPLING_GRANULARITY = 64
SHUFFLE_ALGORITHM = "py1e"
SHUFFLE_BLOCK = 1 << 18


@dataclass(frozen=True)
class Realised:
    """What was read of a domain: blocks, distinct blocks, and reads of the most repeated block."""

    blocks: int
    unique_blocks: int
    most_repeats: int


class TokenStream:
    """The batches of one rank from a step on; never ends.

    Args:
        config: the corpus.
        root: folder of all datasets.
        rank: of `ranks` that share each global batch.
        ranks: data-parallel ranks, not counting those that share a sequence.
        batch_sequences: sequences of a global batch.
        first_step: steps that are already done.
        expected_root_hash: of the dataset, if one was registered.

    Raises:
        ValueError: the config does not fit the dataset, or the ranks do not divide the batch.
        RuntimeError: the dataset is damaged or does not match its manifest.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: DataConfig,
        root: Path,
        *,
        rank: int,
        ranks: int,
        batch_sequences: int,
        first_step: int,
        expected_root_hash: str | None = None,
    ) -> None:
        share = ranks * config.pieces
        if batch_sequences < 1 or batch_sequences % share:
            raise ValueError(
                f"a step of {batch_sequences} sequences cannot be divided: {ranks} ranks x "
                f"{config.pieces} sequences per block need a multiple of {share}; change "
                "optimizer.batch_tokens, corpus.seq_len or execution.ranks"
            )
        assert 0 <= rank < ranks
        self.config, self.rank, self.step = config, rank, first_step
        self._groups_per_step = batch_sequences // config.pieces
        self._groups_per_rank = self._groups_per_step // ranks
        self._folder, self._manifest = open_dataset(config, root, expected_root_hash)
        self._blocks: _Blocks | None = _Blocks(self._folder, self._manifest, config)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current step on."""
        while True:
            first = self.step * self._groups_per_step + self.rank * self._groups_per_rank
            blocks = self._opened()
            batch = blocks.read(blocks.at(range(first, first + self._groups_per_rank)))
            self.step += 1
            yield batch

    def realised(self) -> dict[str, Realised]:
        """What all ranks have read of each domain from step 0 to the current one."""
        blocks = self._opened()
        return blocks.count(self.step * self._groups_per_step)

    def close(self) -> None:
        """Release the dataset; there are no threads, processes or shared memory to clean up."""
        self._blocks = None

    def _opened(self) -> "_Blocks":
        assert self._blocks is not None, "the stream was closed"
        return self._blocks


class _Blocks(StreamingDataset):
    """A StreamingDataset for local, verified shards, private to this process.

    Index, weights, sampling, partition, shuffle and reading are StreamingDataset's own. Its
    constructor is not called, and its iteration not used: they set up shared memory, file locks and
    threads for downloads, of which there are none here. These wait forever for peers that died, and
    outlive a killed process. Attributes have the names that the base class reads; a test compares
    the order with the base class's own. What it calls a sample is a group of joined blocks, or one
    block where none are joined.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: DataConfig) -> None:
        self._manifest, self._config = manifest, config
        self.domains = sorted(config.domains)
        described = [manifest.stream(domain, "train") for domain in self.domains]
        verify_streams(folder, manifest, described)
        self.streams = [
            Stream(local=str(folder / d.folder), proportion=config.domains[d.domain])
            for d in described
        ]
        self._set_order()
        joined = config.joined_blocks
        kept = [_long_enough(folder, manifest, config, d) for d in described]
        self._readers = [shard for shards in kept for shard in shards]
        self._set_index([[shard.samples // joined for shard in shards] for shards in kept])

    def at(self, positions: range) -> np.ndarray:
        """The groups at some positions of the order, which may cross the end of an epoch."""
        length = self._config.epoch_groups
        epochs = range(positions.start // length, (positions.stop - 1) // length + 1)
        parts = []
        for epoch in epochs:
            begin, end = epoch * length, (epoch + 1) * length
            inside = slice(max(positions.start, begin) - begin, min(positions.stop, end) - begin)
            parts.append(self._order(epoch)[inside])
        return np.concatenate(parts)

    def read(self, ids: np.ndarray) -> Batch:
        """The sequences of some groups.

        Raises:
            RuntimeError: a shard was deleted or damaged after it was verified.
        """
        rows, joined = [], self._config.joined_blocks
        for group in ids:
            number, place = self.spanner[int(group)]
            shard = self._readers[number]
            for block in range(place * joined, (place + 1) * joined):
                with located_errors(shard, block):
                    rows.append(shard[block])
        return batch_of(rows, self._config, self._manifest)

    def count(self, groups: int) -> dict[str, Realised]:
        """What the first groups of the order contain of each domain."""
        times = np.zeros(self.num_samples, np.int64)
        length, joined = self._config.epoch_groups, self._config.joined_blocks
        for begin in range(0, groups, length):
            ids = self._order(begin // length)[: groups - begin]
            times += np.bincount(ids, minlength=self.num_samples)
        bounds = [*self.sample_offset_per_stream, self.num_samples]
        return {
            domain: Realised(
                int(part.sum()) * joined, int((part > 0).sum()) * joined, int(part.max())
            )
            for domain, begin, end in zip(self.domains, bounds, bounds[1:], strict=False)
            for part in [times[begin:end]]
        }

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Raise: a shard that is missing now was deleted after the dataset was opened."""
        del shard_id, blocking
        raise FileNotFoundError("it was deleted")

    def _set_order(self) -> None:
        """Fix everything that the order depends on, against other defaults in later versions."""
        self.num_canonical_nodes = self._config.num_canonical_nodes
        self.shuffle, self.shuffle_algo = True, SHUFFLE_ALGORITHM
        self.shuffle_seed = self._config.shuffle_seed
        self.shuffle_block_size = SHUFFLE_BLOCK
        self.sampling_method, self.sampling_granularity = "balanced", SAMPLING_GRANULARITY
        self.epoch_seed_change = True
        self.partition_algo, self.batching_method = "relaxed", "random"
        self.initial_physical_nodes = None
        self.batch_size = 1
        self._orders: dict[int, np.ndarray] = {}

    def _set_index(self, counts: Sequence[list[int]]) -> None:
        """Say which sample lies in which shard, and how many of each stream make an epoch."""
        self.num_streams, self.num_shards = len(self.streams), len(self._readers)
        self.shards_per_stream = np.array([len(c) for c in counts], np.int64)
        self.shard_offset_per_stream = self.shards_per_stream.cumsum() - self.shards_per_stream
        self.stream_per_shard = np.repeat(np.arange(self.num_streams), self.shards_per_stream)
        self.samples_per_stream = np.array([sum(c) for c in counts], np.int64)
        self.sample_offset_per_stream = self.samples_per_stream.cumsum() - self.samples_per_stream
        self.samples_per_shard = np.array([n for c in counts for n in c], np.int64)
        self.sample_offset_per_shard = self.samples_per_shard.cumsum() - self.samples_per_shard
        self.num_samples = int(self.samples_per_stream.sum())
        # Spanner changes the array that it is given.
        self.spanner = Spanner(self.samples_per_shard.copy())
        self.epoch_size = Stream.apply_weights(
            self.streams, self.samples_per_stream, self._config.epoch_groups, self.shuffle_seed
        )
        self.length = self.epoch_size
        shares = [self._config.domains[domain] for domain in self.domains]
        first = [stream.choose for stream in self.streams]
        self._apportioned = Apportionment(shares, self._config.epoch_groups, first)
        self._shard_access_times = np.zeros(self.num_shards, np.uint64)

    def _order(self, epoch: int) -> np.ndarray:
        """The groups of one epoch, in order; the two latest epochs are kept."""
        if epoch not in self._orders:
            for stream, groups in zip(self.streams, self._apportioned[epoch], strict=True):
                stream.choose = groups
            work = generate_work(self.batching_method, self, World(1, 1, 1, 0), epoch, 0)
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = work.reshape(-1)
        return self._orders[epoch]


def _long_enough(
    folder: Path, manifest: Manifest, config: DataConfig, described: manifests.Stream
) -> list[CheckedShard]:
    """The shards of a domain that hold its share of `unique_bytes` and a group of joined blocks."""
    unique = unique_blocks(config, manifest, described.domain)
    shards = _leading(open_shards(folder, described), unique)
    kept = [shard for shard in shards if shard.samples >= config.joined_blocks]
    if not kept:
        raise ValueError(
            f"corpus.seq_len {config.seq_len} joins {config.joined_blocks} blocks, but no shard of "
            f"{described.domain} in {folder} has as many; choose a shorter seq_len, or build the "
            f"dataset with block_tokens {config.seq_len}"
        )
    return kept


def _leading(shards: list[CheckedShard], blocks: int) -> list[CheckedShard]:
    """Shards cut down to the leading blocks of their stream."""
    for shard in shards:
        shard.samples = min(shard.samples, blocks)
        blocks -= shard.samples
    return [shard for shard in shards if shard.samples]
