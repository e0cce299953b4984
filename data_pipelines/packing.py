"""From documents to blocks: scatter into buckets by hash, sort, tokenize and pack.

Everything passes through files, so that memory depends on the size of a bucket, not of the corpus.
These functions run in spawned processes, so no training library is imported here.
"""

import contextlib
import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.config import DatasetConfig
from data_pipelines.durable import open_stage
from data_pipelines.fault_points import fault_point
from data_pipelines.format import token_dtype
from data_pipelines.inputs import Reading, add_name, digest_of
from data_pipelines.lossless import require_same_text
from data_pipelines.sources import Input, folder_name, read_input
from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from untrusted.paths import inside

SPLITS = ("train", "validation")
SCATTERED, PACKED = ".scattered", ".packed"
"""Folders of a build; the dot keeps them apart from domains."""
FLUSH_BYTES = 4 << 20
ENCODE_AT_ONCE = 256
FACTS = "facts.json"
FULL = 0.99
"""Share of domain_bytes from which on a domain counts as full."""

_HEAD = struct.Struct("<QQ16sQ")


@dataclass(frozen=True)
class Scatter:
    """The task of reading one input.

    Attributes:
        index: of the input among all.
        folder: where a folder for each domain is made.
        bucket_bits: leading bits of a document's place that choose its bucket.
    """

    given: Input
    index: int
    folder: str
    bucket_bits: int
    seed: int


@dataclass(frozen=True)
class Pack:
    """The task of tokenizing one domain.

    Attributes:
        folder: of the build, with the scattered documents and the tokenizer.
    """

    config: DatasetConfig
    domain: str
    folder: str


@dataclass(frozen=True)
class Packed:
    """Totals of one split of a domain, before it is cut into blocks."""

    documents: int
    tokens: int
    utf8_bytes: int


@dataclass(frozen=True)
class DomainFacts:
    """Totals of one domain.

    Attributes:
        duplicates: documents dropped because they equal an earlier one.
        beyond_cap: documents left out because the domain had reached its bytes.
    """

    duplicates: int
    beyond_cap: int
    train: Packed
    validation: Packed


@dataclass(frozen=True)
class Keyed:
    """A document with what its hash decides: its position in the order and its split."""

    place: int
    draw: int
    digest: bytes
    data: bytes

    def split(self, validation_fraction: float) -> str:
        """Whether it is held out."""
        return "validation" if self.draw < validation_fraction * 2.0**64 else "train"


def scatter(task: Scatter) -> Reading:
    """Append each document of an input to its bucket; returns what was read."""
    names: dict[str, str] = {}
    empty = 0
    buffers: defaultdict[tuple[str, int], bytearray] = defaultdict(bytearray)
    documents = 0
    for document in read_input(task.given):
        keyed = key_document(document.text.encode(), task.seed)
        if not keyed.data:
            empty += 1
            continue
        documents += 1
        domain = folder_name(document.domain, document.origin)
        add_name(names, domain, document.domain)
        # Leading bits, so that bucket after bucket is also the order of places.
        bucket = keyed.place >> (64 - task.bucket_bits) if task.bucket_bits else 0
        buffer = buffers[domain, bucket]
        buffer += _HEAD.pack(keyed.place, keyed.draw, keyed.digest, len(keyed.data))
        buffer += keyed.data
        if len(buffer) > FLUSH_BYTES:
            _flush(task, domain, bucket, buffer)
    for (domain, bucket), buffer in buffers.items():
        _flush(task, domain, bucket, buffer)
    fault_point("build.scattered_input")
    return Reading(documents, empty, names, digest_of(task.given))


def key_document(data: bytes, seed: int) -> Keyed:
    """Derive a document's position and split from its content and the seed.

    They do not depend on where the document was read, so neither the number of processes nor the
    names of the files change the dataset.
    """
    digest = hashlib.blake2b(data, digest_size=16).digest()
    keyed = hashlib.blake2b(digest, digest_size=16, key=seed.to_bytes(8, "little")).digest()
    place, draw = struct.unpack("<QQ", keyed)
    return Keyed(place, draw, digest, data)


def read_in_order(folder: Path, cap: int | None) -> Iterator[tuple[Keyed | None, str]]:
    """The distinct documents of a domain in their order, up to `cap` bytes.

    Yields:
        A document and "", or None and the reason why one was left out: "duplicate" or "beyond cap".
    """
    buckets: defaultdict[str, list[Path]] = defaultdict(list)
    for part in folder.iterdir():
        buckets[part.name.split(".")[0]].append(part)
    taken, full = 0, False
    for bucket in sorted(buckets):
        found = [keyed for part in buckets[bucket] for keyed in _records(part)]
        # Equal documents have equal keys, so sorting brings duplicates together.
        found.sort(key=lambda keyed: (keyed.place, keyed.digest))
        before = b""
        for keyed in found:
            if keyed.digest == before:
                yield None, "duplicate"
                continue
            before = keyed.digest
            # Once full, always full: taking smaller documents later would favour short ones. But a
            # long document is cut, or what is left of the domain could be a small part of its cap.
            if cap is not None and not full and taken + len(keyed.data) > cap:
                full = True
                cut = _cut(keyed.data, cap - taken)
                if taken < FULL * cap and cut:
                    yield replace(keyed, data=cut), ""
                    continue
            if full:
                yield None, "beyond cap"
                continue
            taken += len(keyed.data)
            yield keyed, ""


def pack(task: Pack) -> DomainFacts:
    """Write the token stream and the document lengths of both splits of a domain."""
    folder = Path(task.folder)
    tokenizer = load_tokenizer(task.config.tokenizer, folder)
    with open_stage(inside(folder / PACKED, task.domain)) as partial:
        assert partial is not None
        facts = _pack_into(partial, task, tokenizer)
        (partial / FACTS).write_text(json.dumps(asdict(facts)))
        fault_point("build.packed_domain")
    return facts


def read_facts(folder: Path) -> DomainFacts:
    """The totals that `pack` stored of a domain."""
    stored = json.loads((folder / FACTS).read_text())
    train, validation = (Packed(**stored.pop(split)) for split in SPLITS)
    return DomainFacts(**stored, train=train, validation=validation)


def count_blocks(tokens: int, block_tokens: int) -> int:
    """Whole blocks in a token stream, each with one more token as its last target."""
    return max(tokens - 1, 0) // block_tokens


def iterate_blocks(
    folder: Path, split: str, block_tokens: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups of blocks of a packed split: tokens and local documents, each (n, block_tokens + 1).

    The last token of a block is the first of the next one, so every token but the very first is a
    target once; what follows the last whole block is dropped.
    """
    if not (folder / f"{split}.tokens").stat().st_size:
        return
    tokens = np.memmap(folder / f"{split}.tokens", token_dtype(size), "r")
    ends = np.fromfile(folder / f"{split}.lengths", np.int64).cumsum()
    blocks = count_blocks(len(tokens), block_tokens)
    window = np.arange(block_tokens + 1)
    for begin in range(0, blocks, 1024):
        starts = np.arange(begin, min(begin + 1024, blocks)) * block_tokens
        positions = starts[:, None] + window  # (blocks, block_tokens + 1)
        # The document of a token is the number of documents that end at or before it.
        documents = np.searchsorted(ends, positions.ravel(), "right").reshape(positions.shape)
        yield tokens[positions], documents - documents[:, :1]


def _cut(data: bytes, size: int) -> bytes:
    """The first bytes of a text, up to the end of a character."""
    return data[:size].decode(errors="ignore").encode()


def _pack_into(partial: Path, task: Pack, tokenizer: Tokenizer) -> DomainFacts:
    scattered = inside(Path(task.folder) / SCATTERED, task.domain)
    left_out = {"duplicate": 0, "beyond cap": 0}
    checked = task.domain if task.config.tokenizer.lossless else None
    with contextlib.ExitStack() as files:
        writers = {
            split: files.enter_context(
                contextlib.closing(_Writer(partial, split, tokenizer, checked))
            )
            for split in SPLITS
        }
        for keyed, reason in read_in_order(scattered, task.config.domain_bytes):
            if keyed is None:
                left_out[reason] += 1
            else:
                writers[keyed.split(task.config.validation_fraction)].add(keyed.data.decode())
        train, validation = (writers[split].finish() for split in SPLITS)
    return DomainFacts(left_out["duplicate"], left_out["beyond cap"], train, validation)


class _Writer:
    """Tokenizes documents and appends them to the flat files of a split.

    Args:
        folder: of the domain.
        domain: for messages; None if the tokenizer may change the text.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, domain: str | None) -> None:
        self._tokenizer, self._split, self._domain = tokenizer, split, domain
        self._border = np.array([tokenizer.special], token_dtype(tokenizer.size))
        self._tokens = (folder / f"{split}.tokens").open("wb")
        self._lengths = (folder / f"{split}.lengths").open("wb")
        self._waiting: list[str] = []
        self._documents = self._count = self._bytes = 0

    def add(self, text: str) -> None:
        """Append a document."""
        self._waiting.append(text)
        self._bytes += len(text.encode())
        if len(self._waiting) >= ENCODE_AT_ONCE:
            self._write()

    def finish(self) -> Packed:
        """Write what is waiting and return the totals."""
        self._write()
        return Packed(self._documents, self._count, self._bytes)

    def close(self) -> None:
        """Close the files, also after an error."""
        self._tokens.close()
        self._lengths.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        encoded = self._tokenizer.encode_many(self._waiting)
        if self._domain is not None:
            for number, (text, ids) in enumerate(zip(self._waiting, encoded, strict=True), start=1):
                place = f"{self._domain}/{self._split}, document {self._documents + number}"
                require_same_text(text, self._tokenizer.bytes_of(ids), place)
        border, dtype = self._border, self._border.dtype
        # Each document is enclosed in special tokens, so that it also predicts its end.
        pieces = [part for ids in encoded for part in (border, ids.astype(dtype), border)]
        lengths = np.array([len(ids) + 2 for ids in encoded], np.int64)
        # ndarray.tofile would hide the reason of a failure, such as a full disk.
        self._tokens.write(np.concatenate(pieces).tobytes())
        self._lengths.write(lengths.tobytes())
        self._documents += len(encoded)
        self._count += int(lengths.sum())
        self._waiting.clear()


def _flush(task: Scatter, domain: str, bucket: int, buffer: bytearray) -> None:
    folder = inside(Path(task.folder), domain)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{bucket:05d}.{task.index:06d}").open("ab") as file:
        file.write(buffer)
    buffer.clear()


def _records(path: Path) -> Iterator[Keyed]:
    content = path.read_bytes()
    position = 0
    while position < len(content):
        place, draw, digest, length = _HEAD.unpack_from(content, position)
        position += _HEAD.size
        yield Keyed(place, draw, digest, content[position : position + length])
        position += length
