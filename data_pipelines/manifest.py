"""The manifest of a finished dataset: its streams, its shards and a hash over all of them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines.config import NAME, domain_folder
from data_pipelines.durable import write_durably
from data_pipelines.format import SHARD_BYTES, columns
from untrusted.json_text import parse_json
from untrusted.paths import inside

MANIFEST = "MANIFEST.json"
INDEX = "index.json"
MAX_MANIFEST_BYTES = 256 << 20
"""Some 500,000 shards of 8 MB."""
MAX_HEADER_BYTES = 1 << 16
MAX_BLOCK_TOKENS = 1 << 24


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
    size = file.stat().st_size
    if size > MAX_MANIFEST_BYTES:
        raise RuntimeError(
            f"{file} has {size} bytes, more than the {MAX_MANIFEST_BYTES} of a manifest; "
            f"{rebuild(folder)}"
        )
    try:
        plain = parse_json(file.read_text())
        streams = tuple(
            Stream(**{**s, "shards": tuple(Shard(**shard) for shard in s["shards"])})
            for s in plain.pop("streams")
        )
        manifest = Manifest(**plain, streams=streams)
        altered = root_hash(manifest) != manifest.root_hash
        if not altered:
            _check(manifest)
            for stream in streams:
                # Neither folder may be a link to elsewhere.
                inside(folder, stream.domain, stream.split)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RuntimeError(
            f"{file} cannot be read ({type(error).__name__}: {error}); {rebuild(folder)}"
        ) from error
    if altered:
        raise RuntimeError(
            f"{file} does not match its own root hash, so it was altered; {rebuild(folder)}"
        )
    return manifest


def _check(manifest: Manifest) -> None:
    """Check what sizes memory or names files, before anything else is opened.

    Raises:
        ValueError: a value is of a wrong type, out of range, or names a file elsewhere.
    """
    _require(isinstance(manifest.config, dict), "config", manifest.config)
    _require(isinstance(manifest.source, dict), "source", manifest.source)
    _require(NAME.fullmatch(str(manifest.config.get("name"))), "config.name", manifest.config)
    tokenizer = manifest.config.get("tokenizer")
    _require(isinstance(tokenizer, dict) and {"kind", "vocab_size"} <= set(tokenizer),
             "config.tokenizer", tokenizer)  # fmt: skip
    _require_count("vocab_size", manifest.vocab_size, 1 << 32)
    _require_count("block_tokens", manifest.block_tokens, MAX_BLOCK_TOKENS)
    for stream in manifest.streams:
        _require(domain_folder(stream.domain) == stream.domain, "domain", stream.domain)
        _require(stream.split in ("train", "validation"), "split", stream.split)
        for key in ("blocks", "tokens", "utf8_bytes", "documents", "document_bytes"):
            _require_count(f"{stream.folder} {key}", getattr(stream, key), 1 << 62)
        _require(sum(shard.samples for shard in stream.shards) == stream.blocks,
                 f"{stream.folder} blocks", stream.blocks)  # fmt: skip
        for shard in stream.shards:
            _check_shard(manifest, stream, shard)


def _check_shard(manifest: Manifest, stream: Stream, shard: Shard) -> None:
    """A shard lies in its stream's folder and has the bytes of its blocks."""
    for name in (shard.name, shard.zip_name):
        place, _, base = str(name).rpartition("/")
        _require(place == stream.folder and NAME.fullmatch(base), "shard", name)
    _require_count(f"{shard.name} samples", shard.samples, SHARD_BYTES)
    expected = columns(manifest.block_tokens, manifest.vocab_size)
    row = 8 + sum(
        (manifest.block_tokens + 1) * {"uint16": 2, "uint32": 4}[expected[key].split(":")[1]]
        for key in ("tokens", "documents")
    )
    # Beside the blocks: an offset of each, and a description of the columns.
    beside = shard.raw_bytes - shard.samples * row - 4 * shard.samples
    _require(0 <= beside <= MAX_HEADER_BYTES, f"{shard.name} raw_bytes", shard.raw_bytes)
    _require_count(f"{shard.name} zip_bytes", shard.zip_bytes, 2 * shard.raw_bytes)


def _require_count(key: str, value: object, most: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    _require(fits, key, value)


def _require(fits: object, key: str, value: object) -> None:
    if not fits:
        raise ValueError(f"{key} cannot be {str(value)[:80]!r}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically and durably."""
    write_durably(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def rebuild(folder: Path) -> str:
    """The fix for a dataset that cannot be used, for error messages."""
    return f"delete {folder} and build the dataset again"
