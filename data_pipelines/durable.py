"""Files and folders that appear on disk complete or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def open_stage(final: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `final` when the block ends; None if `final` exists.

    It is deleted after an error, so that it does not keep a full disk full.
    """
    if final.exists():
        yield None
        return
    partial = final.with_name(final.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Contents before the rename: after a power failure a folder with its final name is complete.
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace a text file atomically, and fsync it."""
    partial = path.with_name(path.name + ".tmp")
    # It may be a link, which a write would follow.
    partial.unlink(missing_ok=True)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Wait for a file lock and hold it; the system releases it if the process dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
