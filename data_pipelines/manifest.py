"""The manifest of a finished dataset: its streams, its shards and a hash over all of them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines.durable import write_durably
from untrusted.json_text import parse_json
from untrusted.paths import inside, plain_name

MANIFEST = "MANIFEST.json"
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One file of blocks, stored compressed, and decompressed next to it when first read.

    Attributes:
        name: of the decompressed file, relative to the dataset's folder.
    """

    name: str
    samples: int
    raw_bytes: int
    raw_sha256: str
    zip_name: str
    zip_bytes: int
    zip_sha256: str


@dataclass(frozen=True)
class Stream:
    """One split of one domain.

    Attributes:
        tokens: targets it offers: blocks x tokens a block.
        utf8_bytes: that those targets stand for.
        documents: that lie in its blocks, the last one perhaps cut.
        document_bytes: of all documents that were packed.
    """

    domain: str
    split: str
    blocks: int
    tokens: int
    utf8_bytes: int
    documents: int
    document_bytes: int
    duplicates: int
    shards: tuple[Shard, ...]

    @property
    def folder(self) -> str:
        """Where it lies in the dataset."""
        return f"{self.domain}/{self.split}"


@dataclass(frozen=True)
class Manifest:
    """A finished dataset.

    Attributes:
        config: the DatasetConfig it was built from, as plain data.
        source: where the documents are from: versions, inputs, domains with too little text.
        root_hash: of everything that a run reads; times and paths are not part of it.
    """

    config: dict
    vocab_size: int
    tokenizer_fingerprint: str
    block_tokens: int
    source: dict
    streams: tuple[Stream, ...]
    root_hash: str

    def stream(self, domain: str, split: str) -> Stream:
        """One split of one domain.

        Raises:
            ValueError: there is none of that name.
        """
        for stream in self.streams:
            if (stream.domain, stream.split) == (domain, split):
                return stream
        known = sorted({f"{s.domain}/{s.split}" for s in self.streams})
        raise ValueError(
            f"corpus.domains names {domain}/{split}, which dataset {self.config['name']} lacks; "
            f"choose among {', '.join(known)}"
        )

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted({stream.domain for stream in self.streams})


def root_hash(manifest: Manifest) -> str:
    """Hash of everything in a dataset that a run could see."""
    content = {
        "vocab_size": manifest.vocab_size,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "block_tokens": manifest.block_tokens,
        "streams": [
            {
                "folder": stream.folder,
                "blocks": stream.blocks,
                "tokens": stream.tokens,
                "utf8_bytes": stream.utf8_bytes,
                "documents": stream.documents,
                "shards": [[s.name, s.samples, s.raw_bytes, s.raw_sha256] for s in stream.shards],
            }
            for stream in manifest.streams
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished dataset.

    Raises:
        RuntimeError: it is missing, unreadable or altered.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise RuntimeError(
            f"{file} does not exist, so {folder} holds no finished dataset; build it first"
        )
    try:
        plain = parse_json(file.read_text())
        streams = tuple(
            Stream(**{**s, "shards": tuple(Shard(**shard) for shard in s["shards"])})
            for s in plain.pop("streams")
        )
        manifest = Manifest(**plain, streams=streams)
        for stream in streams:
            _require_inside(folder, stream)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RuntimeError(
            f"{file} cannot be read ({type(error).__name__}: {error}); {rebuild(folder)}"
        ) from error
    if root_hash(manifest) != manifest.root_hash:
        raise RuntimeError(
            f"{file} does not match its own root hash, so it was altered; {rebuild(folder)}"
        )
    return manifest


def _require_inside(folder: Path, stream: Stream) -> None:
    """Check that a stream's files lie where its name says, and nowhere else."""
    inside(folder, stream.domain, stream.split)
    for name in (name for shard in stream.shards for name in (shard.name, shard.zip_name)):
        at, _, last = name.rpartition("/")
        # A link in a shard's place is found, and replaced, when shards are verified.
        if at != stream.folder or not plain_name("a shard", last):
            raise ValueError(f"shard {name!r} does not lie in {stream.folder}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically and durably."""
    write_durably(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def rebuild(folder: Path) -> str:
    """The fix for a dataset that cannot be used, for error messages."""
    return f"delete {folder} and build the dataset again"
