"""Open the shards of a dataset, hash them when first read, turn blocks into batches, certify."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from streaming import Stream
from streaming.base.format.mds import MDSReader
from streaming.base.world import World

from data_pipelines import manifest as manifests
from data_pipelines.batch import Batch, cut_blocks, join_blocks, mix
from data_pipelines.config import DataConfig
from data_pipelines.manifest import Manifest, read_manifest, rebuild
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.verify import make_sure
from untrusted.paths import inside


def certificate(samples: np.ndarray) -> int:
    """A sum modulo 2^64 that is equal for equal multisets of sample ids, in any order."""
    return int(mix(samples, 0).sum(dtype=np.uint64))


def open_dataset(config: DataConfig, root: Path, expected: str | None) -> tuple[Path, Manifest]:
    """The folder and manifest of a corpus's dataset, checked against the config."""
    folder = inside(root, config.dataset)
    manifest = read_manifest(folder)
    if expected is not None and manifest.root_hash != expected:
        raise RuntimeError(
            f"dataset {folder} has the root hash {manifest.root_hash[:16]}, but "
            f"{expected[:16]} was registered; restore the registered dataset"
        )
    if config.block_tokens != manifest.block_tokens:
        raise ValueError(
            f"corpus.block_tokens is {config.block_tokens}, but dataset {folder} has blocks of "
            f"{manifest.block_tokens}; set it to match"
        )
    built = manifest.config["tokenizer"]
    if (config.tokenizer.kind, config.tokenizer.vocab_size) != (built["kind"], built["vocab_size"]):
        raise ValueError(
            f"corpus.tokenizer is {config.tokenizer.kind} of {config.tokenizer.vocab_size} ids, "
            f"but dataset {folder} was built with {built['kind']} of {built['vocab_size']}; "
            "set it to match"
        )
    fingerprint = load_tokenizer(config.tokenizer, folder).fingerprint
    if fingerprint != manifest.tokenizer_fingerprint:
        raise RuntimeError(
            f"the tokenizer in {folder} is not the one its blocks were built with; "
            f"{rebuild(folder)}"
        )
    return folder, manifest


class CheckedShard:
    """A reader of one shard that hashes the file before its first block is read.

    Bits may rot in a file whose size and times stay the same, so no earlier check counts. SHA-256
    of a shard of 8 MiB took 7 to 27 ms on a shared CPU core, once for each stream that reads it.

    Attributes:
        samples: leading blocks that are read.
    """

    def __init__(self, folder: Path, shard: manifests.Shard, reader: MDSReader) -> None:
        self._folder, self._shard, self._reader = folder, shard, reader
        self._sound = False
        self.samples: int = reader.samples
        self.name = str(folder / shard.name)

    def __getitem__(self, place: int) -> dict:
        """One block."""
        if not self._sound:
            make_sure(self._folder, self._shard)
            self._sound = True
        return self._reader[place]


def open_shards(folder: Path, described: manifests.Stream) -> list[CheckedShard]:
    """Readers of the shards of one stream, made as StreamingDataset makes them."""
    stream = Stream(local=str(folder / described.folder), split="")
    readers = stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
    return [
        CheckedShard(folder, shard, reader)  # type: ignore[arg-type]
        for shard, reader in zip(described.shards, readers, strict=True)
    ]


def batch_of(rows: list[dict], config: DataConfig, manifest: Manifest) -> Batch:
    """Make a batch of decompressed blocks, cut or joined to the sequence length."""
    tokens = np.stack([row["tokens"] for row in rows])
    if int(tokens.max()) >= manifest.vocab_size:
        raise RuntimeError(
            f"dataset {config.dataset} holds the token {tokens.max()}, but its tokenizer has "
            f"{manifest.vocab_size} ids; check it with launch/sweep.py SWEEP --verify"
        )
    documents = np.stack([row["documents"] for row in rows])
    samples = np.array([row["sample"] for row in rows], np.uint64)
    longer = join_blocks(tokens, documents, samples, config.joined_blocks)
    return cut_blocks(*longer, config.seq_len)


@contextlib.contextmanager
def located_errors(shard: CheckedShard, place: int) -> Iterator[None]:
    """Add the shard and the sample to any error while one is read."""
    try:
        yield
    except (ValueError, IndexError, OSError) as error:
        raise RuntimeError(
            f"shard {shard.name} cannot be read at sample {place}: "
            f"{error}; it has changed since it was verified, rerun to verify it again"
        ) from error
