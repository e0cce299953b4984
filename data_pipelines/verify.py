"""Verification of a dataset's files before a block is read.

The manifest is the authority. An index that differs from it is rejected, so that no path, encoding
or size of a tampered index reaches the reader. Each shard is hashed by every process before its
first block is read, training and evaluation alike.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import zstandard

from data_pipelines.config import NAME
from data_pipelines.durable import hold_lock, sync
from data_pipelines.fault_points import fault_point
from data_pipelines.format import COMPRESSION, HASHES, SHARD_BYTES, columns
from data_pipelines.manifest import INDEX, Manifest, Shard, Stream, read_manifest, rebuild
from untrusted.paths import refuse_links

MAX_INDEX_BYTES_PER_SHARD = 4096


def verify_streams(folder: Path, manifest: Manifest, streams: Sequence[Stream]) -> None:
    """Verify the indices of some streams, and decompress shards that are not decompressed yet.

    The content of those that are is hashed when they are first read.

    Raises:
        RuntimeError: an index or a shard does not match the manifest.
    """
    refuse_links(folder)
    for stream in streams:
        _verify_index(folder, manifest, stream)
    shards = [shard for stream in streams for shard in stream.shards]
    for shard in shards:
        if not _has_its_size(folder, shard):
            make_sure(folder, shard)


def verify_dataset(folder: Path) -> Manifest:
    """Check every byte of a dataset.

    Raises:
        RuntimeError: a file does not match the manifest.
    """
    manifest = read_manifest(folder)
    for stream in manifest.streams:
        _verify_index(folder, manifest, stream)
        for shard in stream.shards:
            _read_compressed(folder, shard)
            if (folder / shard.name).exists() and not _raw_is_right(folder, shard):
                raise RuntimeError(
                    f"shard {folder / shard.name} does not match the manifest, but its compressed "
                    "form does; delete it, and it is decompressed again"
                )
    return manifest


def missing_file(folder: Path, manifest: Manifest) -> str | None:
    """The first file of a dataset that is missing or of another size, found without reading."""
    for stream in manifest.streams:
        names = [(shard.zip_name, shard.zip_bytes) for shard in stream.shards]
        for name, size in [(f"{stream.folder}/{INDEX}", None), *names]:
            path = folder / name
            if not path.is_file() or size not in (None, path.stat().st_size):
                return str(path)
    return None


def _verify_index(folder: Path, manifest: Manifest, stream: Stream) -> None:
    path = folder / stream.folder / INDEX
    if not path.is_file():
        raise RuntimeError(f"index {path} is missing; {rebuild(folder)}")
    if path.stat().st_size > MAX_INDEX_BYTES_PER_SHARD * (len(stream.shards) + 1):
        raise RuntimeError(f"index {path} is too large for an index; {rebuild(folder)}")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"index {path} cannot be read: {error}; {rebuild(folder)}") from error
    expected = [_expected_entry(manifest, shard) for shard in stream.shards]
    wrong = _difference({"version": 2, "shards": expected}, found, "")
    if wrong:
        raise RuntimeError(f"index {path} does not repeat the manifest: {wrong}; {rebuild(folder)}")


def _expected_entry(manifest: Manifest, shard: Shard) -> dict:
    encodings = columns(manifest.block_tokens, manifest.vocab_size)
    names = sorted(encodings)
    bytes_of = {"uint16": 2, "uint32": 4}
    length = manifest.block_tokens + 1
    sizes = {n: length * bytes_of[encodings[n].split(":")[1]] for n in ("documents", "tokens")}
    raw, zipped = Path(shard.name).name, Path(shard.zip_name).name
    for name in (raw, zipped):
        if not NAME.fullmatch(name):
            raise RuntimeError(
                f"the manifest lists the shard {name!r}, which is not a plain file name; rebuild"
            )
    return {
        "version": 2,
        "format": "mds",
        "compression": COMPRESSION,
        "hashes": list(HASHES),
        "size_limit": SHARD_BYTES,
        "samples": shard.samples,
        "column_names": names,
        "column_encodings": [encodings[name] for name in names],
        "column_sizes": [{**sizes, "sample": 8}[name] for name in names],
        "raw_data": _entry(raw, shard.raw_bytes, shard.raw_sha256),
        "zip_data": _entry(zipped, shard.zip_bytes, shard.zip_sha256),
    }


def _entry(name: str, size: int, digest: str) -> dict:
    return {"basename": name, "bytes": size, "hashes": {"sha256": digest}}


def _difference(expected: object, found: object, path: str) -> str:
    """A description of where two trees of plain data first differ; empty if they are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(k for k in found if k not in expected)]:
            where = f"{path}.{key}".strip(".")
            if key not in expected or key not in found:
                return f"{where} is {'unknown' if key in found else 'missing'}"
            if wrong := _difference(expected[key], found[key], where):
                return wrong
        return ""
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return next((w for i, (e, f) in pairs if (w := _difference(e, f, f"{path}[{i}]"))), "")
    if type(expected) is type(found) and expected == found:
        return ""
    return f"{path} is {str(found)[:80]!r}, not {str(expected)[:80]!r}"


def make_sure(folder: Path, shard: Shard) -> None:
    """Hash the decompressed shard, and decompress it again if it is missing or damaged.

    Raises:
        RuntimeError: it is damaged, and its compressed form is damaged or missing too.
    """
    if _raw_is_right(folder, shard):
        return
    with _locked(folder):
        # Another process may have decompressed it while this one waited for the lock.
        if not _raw_is_right(folder, shard):
            _decompress(folder, shard)


def _decompress(folder: Path, shard: Shard) -> None:
    content = _read_compressed(folder, shard)
    path = folder / shard.name
    partial = path.with_name(path.name + ".tmp")
    try:
        # It may be a link, which a write would follow.
        partial.unlink(missing_ok=True)
        partial.write_bytes(content)
        sync(partial)
        fault_point("verify.decompressed")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RuntimeError(_cannot_decompress(error, path, len(content))) from error


def _cannot_decompress(error: OSError, path: Path, size: int) -> str:
    """Why a shard cannot be written, with the remedy of that reason."""
    begin = f"shard {path} cannot be decompressed: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return f"{begin}; it needs {size} bytes and {free} are free; free some disk space and rerun"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{begin}; {path.parent} belongs to user id {path.parent.stat().st_uid}, and you are "
            f"{os.geteuid()}; ask its owner to let you write there or to read the dataset once, or "
            "copy it and give the copy's folder as execution.data_root"
        )
    return f"{begin}; check that disk and rerun"


def _has_its_size(folder: Path, shard: Shard) -> bool:
    try:
        status = (folder / shard.name).lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == shard.raw_bytes


def _raw_is_right(folder: Path, shard: Shard) -> bool:
    if not _has_its_size(folder, shard):
        return False
    with (folder / shard.name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.raw_sha256


def _read_compressed(folder: Path, shard: Shard) -> bytes:
    """The content of a shard from its compressed form, hashed before and after decompression."""
    path = folder / shard.zip_name
    if not path.is_file() or path.is_symlink():
        raise RuntimeError(f"shard {path} is missing; {rebuild(folder)}")
    size = path.stat().st_size
    if size != shard.zip_bytes:
        raise RuntimeError(
            f"shard {path} has {size} bytes instead of {shard.zip_bytes}, so it is truncated or "
            f"replaced; {rebuild(folder)}"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.zip_sha256:
        raise RuntimeError(
            f"shard {path} does not match its hash, so it is damaged; {rebuild(folder)}"
        )
    # One byte more than expected, and no more: a wrong file cannot fill the memory.
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        content = reader.read(shard.raw_bytes + 1)
    if hashlib.sha256(content).hexdigest() != shard.raw_sha256:
        raise RuntimeError(
            f"shard {path} decompresses to content that does not match the manifest; "
            f"{rebuild(folder)}"
        )
    return content


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time decompress; on a read-only disk there is nothing to write."""
    if os.access(folder, os.W_OK):
        with hold_lock(folder / ".verify.lock"):
            yield
    else:
        yield
