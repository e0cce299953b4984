"""Files of lines that are only ever appended to: whole lines or none, and what was torn set aside.

A full disk may take a part of a write and a power failure the end of a line. What follows a torn
line would be read as its end, so the next writer first moves it to `<name>.torn`.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Seal:
    """The length and hash of a file's first bytes, which later appends do not change."""

    bytes: int
    sha256: str

    def holds(self, path: Path) -> bool:
        """Whether a file begins with those bytes."""
        if not path.is_file():
            return self.bytes == 0
        digest = hashlib.sha256()
        with path.open("rb") as file:
            left = self.bytes
            while left and (block := file.read(min(left, BLOCK_BYTES))):
                digest.update(block)
                left -= len(block)
        return left == 0 and digest.hexdigest() == self.sha256


class AppendFile:
    """A file of lines with one writer, which knows the hash of all that it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        set_torn_line_aside(self._file, path)
        self._digest, self._bytes = hashlib.sha256(), 0
        for block in _blocks(self._file):
            self._note(block)

    @property
    def seal(self) -> Seal:
        """Of all lines so far."""
        return Seal(self._bytes, self._digest.hexdigest())

    def append(self, lines: str) -> None:
        """Add whole lines: all of them or, after an error, none.

        Raises:
            OSError: names the file.
        """
        content = lines.encode()
        append_whole(self._file, content, self.path)
        self._note(content)

    def sync(self) -> None:
        """Fsync every line."""
        with named_errors(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _note(self, content: bytes) -> None:
        self._digest.update(content)
        self._bytes += len(content)


def append_line_shared(path: Path, line: str) -> None:
    """Append and fsync one line to a file that several processes write, on any host.

    Raises:
        OSError: names the file; nothing was added to it.
    """
    with named_errors(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # The system releases the lock if the process dies; then the next one sees a torn line.
            fcntl.flock(file, fcntl.LOCK_EX)
            set_torn_line_aside(file, path)
            append_whole(file, line.encode(), path)
            os.fsync(file)
        finally:
            os.close(file)


def append_whole(file: int, content: bytes, path: Path) -> None:
    """Write all bytes at the end of a file, or none of them.

    Raises:
        OSError: the disk took a part, or nothing; the file is as before.
    """
    before = os.fstat(file).st_size
    try:
        with named_errors(path):
            written = os.write(file, content)
            while written < len(content):
                # The rest of a short write either fits after all or fails with the reason.
                more = os.write(file, content[written:])
                if more == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += more
    except OSError:
        os.ftruncate(file, before)
        raise


def set_torn_line_aside(file: int, path: Path) -> None:
    """Move what follows the last newline of a file to the end of `<name>.torn`."""
    size = os.fstat(file).st_size
    end = _whole_lines(file, size)
    if end == size:
        return
    torn = os.pread(file, size - end, end)
    # A full disk must not keep the file torn: the line is worth nothing without its end.
    with contextlib.suppress(OSError), path.with_name(f"{path.name}.torn").open("ab") as aside:
        aside.write(torn + b"\n")
    os.ftruncate(file, end)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the file's path to a system error that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _whole_lines(file: int, size: int) -> int:
    """Bytes up to the last newline, found from the end."""
    end = size
    while end:
        begin = max(end - BLOCK_BYTES, 0)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _blocks(file: int) -> Iterator[bytes]:
    place = 0
    while block := os.pread(file, BLOCK_BYTES, place):
        yield block
        place += len(block)
