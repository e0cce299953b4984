"""Where documents come from: Pile-format JSON lines and folders of text files."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from data_pipelines.config import SourceConfig

SOURCE = "SOURCE.json"
"""File with the totals of a source."""
MAX_LINE_BYTES = 64 << 20
MAX_RATIO = 200
"""Largest decompressed size as a multiple of the compressed one; text stays below 20."""
CHUNK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 11
"""Compressed bytes read at once: few, since each could decompress to 44,000 bytes."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        domain: as a folder name.
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
            mine = (
                [given] if given.is_file() else [*given.glob("*.jsonl"), *given.glob("*.jsonl.zst")]
            )
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
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


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
            row = json.loads(line)
            text, domain = row["text"], row["meta"]["pile_set_name"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RuntimeError(
                f"{place} is not a document ({type(error).__name__}: {error}); each line must be "
                '{"text": "...", "meta": {"pile_set_name": "..."}}; repair or remove it'
            ) from error
        yield Document(folder_name(domain, place), text, place)


def read_text_folder(path: Path) -> Iterator[Document]:
    """Every file below a folder is a document; the folder's name is the domain.

    Raises:
        RuntimeError: a file is not UTF-8.
    """
    domain = folder_name(path.name, str(path))
    for file in files_of(Input(str(path), "text_folder")):
        try:
            yield Document(domain, file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError as error:
            raise RuntimeError(f"{file} is not UTF-8: {error}; convert or remove it") from error


def write_jsonl_line(document: Document) -> bytes:
    """A document as a line in the Pile's format."""
    row = {"text": document.text, "meta": {"pile_set_name": document.domain}}
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def folder_name(domain: object, place: str) -> str:
    """A domain's name as a folder: runs of other characters become a dash.

    Raises:
        RuntimeError: nothing is left of it.
    """
    name = re.sub(r"[^A-Za-z0-9._]+", "-", str(domain)).strip("-.")
    if not name or not isinstance(domain, str):
        raise RuntimeError(
            f"{place} has the domain {domain!r}, which cannot be a folder name; rename it"
        )
    return name


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file that are not blank, read as a stream."""
    rest, number = b"", 0
    for chunk in _decompressed(path) if path.suffix == ".zst" else _chunks(path, CHUNK_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > MAX_LINE_BYTES:
            raise RuntimeError(
                f"{path} line {number + 1} is longer than {MAX_LINE_BYTES} bytes; "
                "cut or remove the document"
            )
    if rest.strip():
        yield number + 1, rest


def _decompressed(path: Path) -> Iterator[bytes]:
    """The content of a zstd file; a bomb or a truncated file ends it with an error."""
    size, read = path.stat().st_size, 0
    frame = None
    for chunk in _chunks(path, COMPRESSED_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
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
