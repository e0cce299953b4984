"""Where documents come from: Pile-format JSON lines and folders of text files."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from data_pipelines.config import SourceConfig, domain_folder

SOURCE = "SOURCE.json"
"""File with the totals of a source."""
MAX_LINE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 30
"""Largest file of a text folder."""
MAX_CONTAINERS = 100_000
"""Most lists and mappings of a line: each takes some 60 bytes of memory, two of them a file."""
MAX_RATIO = 200
"""Largest decompressed size as a multiple of the compressed one; text stays below 20."""
WINDOW_BYTES, MAX_WINDOW_BYTES = 1 << 27, 1 << 31
CHUNK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 11
"""Compressed bytes read at once: few, since each could decompress to 44,000 bytes."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        domain: its name as it was written.
        origin: file and line, for messages.
    """

    domain: str
    text: str
    origin: str


@dataclass(frozen=True)
class Input:
    """A unit of reading: one JSON-lines file, or the folder of one domain."""

    path: str
    kind: str


def list_inputs(source: SourceConfig) -> list[Input]:
    """The files and folders of a source, sorted.

    Raises:
        ValueError: a path does not exist or holds nothing of its kind.
    """
    found: list[Input] = []
    for given in map(Path, source.paths):
        if not given.exists():
            raise ValueError(
                f"source.paths: {given} does not exist; give an existing file or folder"
            )
        if source.kind == "jsonl":
            inside = [*given.glob("*.jsonl"), *given.glob("*.jsonl.zst")]
            mine = [given] if given.is_file() else [path for path in inside if path.is_file()]
        else:
            mine = (
                [folder for folder in given.iterdir() if folder.is_dir()] if given.is_dir() else []
            )
        if not mine:
            raise ValueError(
                f"source.paths: {given} holds nothing for kind {source.kind}; jsonl needs .jsonl "
                "or .jsonl.zst files, text_folder needs one sub-folder for each domain"
            )
        found += [Input(str(path), source.kind) for path in sorted(mine)]
    return found


def files_of(given: Input) -> list[Path]:
    """The files that an input consists of, sorted."""
    path = Path(given.path)
    return [path] if path.is_file() else [file for file in _walk(path) if file.is_file()]


def left_out(source: SourceConfig) -> list[Path]:
    """What lies in the folders of a source and is not read, sorted; hidden files do not count."""
    read = {file for given in list_inputs(source) for file in files_of(given)}
    folders = [path for path in map(Path, source.paths) if path.is_dir()]
    found = {file for folder in folders for file in _walk(folder)} - read
    return sorted(file for file in found if not file.name.startswith("."))


def _walk(folder: Path) -> list[Path]:
    """All that is no folder below a folder, through links too, each linked folder once."""

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = {name: os.path.realpath(f"{place}/{name}") for name in folders}
        # A link to a folder above it would never end.
        folders[:] = [name for name in sorted(folders) if real[name] not in seen]
        seen.update(real.values())
        found += [Path(place) / name for name in names]
    return sorted(found)


def read_input(given: Input) -> Iterator[Document]:
    """The documents of one input, in order.

    Raises:
        RuntimeError: a line or file is malformed.
    """
    path = Path(given.path)
    yield from read_jsonl(path) if given.kind == "jsonl" else read_text_folder(path)


def read_jsonl(path: Path) -> Iterator[Document]:
    """The documents of a file in the Pile's format, decompressed as a stream.

    Raises:
        RuntimeError: a line is not a document, or the file is a decompression bomb.
    """
    for number, line in _lines(path):
        place = f"{path} line {number}"
        try:
            _require_shallow(line)
            row = json.loads(line)
            text, domain = row["text"], row["meta"]["pile_set_name"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RuntimeError(
                f"{place} is not a document ({type(error).__name__}: {error}); each line must be "
                '{"text": "...", "meta": {"pile_set_name": "..."}}; repair or remove it'
            ) from error
        folder_name(domain, place)
        yield Document(domain, text, place)


def read_text_folder(path: Path) -> Iterator[Document]:
    """Every file below a folder is a document; the folder's name is the domain.

    Raises:
        RuntimeError: a file is not UTF-8.
    """
    folder_name(path.name, str(path))
    for file in files_of(Input(str(path), "text_folder")):
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise RuntimeError(
                f"{file} has {size} bytes, more than the {MAX_TEXT_BYTES} of a document; cut it"
            )
        try:
            # Not as text: that would turn the line ends of Windows into others.
            yield Document(path.name, file.read_bytes().decode(), str(file))
        except UnicodeDecodeError as error:
            raise RuntimeError(f"{file} is not UTF-8: {error}; convert or remove it") from error


def write_jsonl_line(document: Document) -> bytes:
    """A document as a line in the Pile's format."""
    row = {"text": document.text, "meta": {"pile_set_name": document.domain}}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _require_shallow(line: bytes) -> None:
    """Check how many lists and mappings a line has, before they are made."""
    if line.count(b"[") + line.count(b"{") <= MAX_CONTAINERS:
        return
    outside = _STRING.sub(b"", line)
    containers = outside.count(b"[") + outside.count(b"{")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"it has {containers} lists and mappings, {MAX_CONTAINERS} are read")


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def folder_name(domain: object, place: str) -> str:
    """A domain's name as a folder.

    Raises:
        RuntimeError: it cannot be one.
    """
    try:
        return domain_folder(domain)
    except ValueError as error:
        raise RuntimeError(f"{place} is refused: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file that are not blank, read as a stream."""
    # A list, since adding to a long line again and again would take quadratic time.
    rest: list[bytes] = []
    length = number = 0
    for chunk in _decompressed(path) if path.suffix == ".zst" else _chunks(path, CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        length += len(first)
        if others:
            *lines, last = [b"".join(rest), *others]
            rest, length = [last], len(last)
            for line in lines:
                number += 1
                if line.strip():
                    yield number, line
        if length > MAX_LINE_BYTES:
            raise RuntimeError(
                f"{path} line {number + 1} is longer than {MAX_LINE_BYTES} bytes; "
                "cut or remove the document"
            )
    line = b"".join(rest)
    if line.strip():
        yield number + 1, line


def _decompressed(path: Path) -> Iterator[bytes]:
    """The content of a zstd file; a bomb or a truncated file ends it with an error."""
    size, read = path.stat().st_size, 0
    if not size:
        raise RuntimeError(f"{path} has 0 bytes, which is no zstd file; download it again")
    # The header of a frame says how much memory its window takes: as much as a file of this size
    # could need, but for the default of the zstd tool.
    window = min(max(1 << (MAX_RATIO * size).bit_length(), WINDOW_BYTES), MAX_WINDOW_BYTES)
    frame = None
    for chunk in _chunks(path, COMPRESSED_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=window).decompressobj()
            try:
                content = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise RuntimeError(
                    f"{path} cannot be decompressed: {error}; download it again"
                ) from error
            read += len(content)
            if read > MAX_RATIO * size + CHUNK_BYTES:
                raise RuntimeError(
                    f"{path} has {size} bytes and decompresses to more than {MAX_RATIO} times "
                    "that, which text does not; remove it"
                )
            yield content
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise RuntimeError(f"{path} is truncated; download it again")


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk
