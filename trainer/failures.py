"""How an error ends a command: its exit code, and one line that says where it struck."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from trainer.exit_codes import ExitCode

FULL = frozenset([errno.ENOSPC, errno.EDQUOT])
DISK_ERRORS = FULL | {errno.EROFS, errno.EIO}
SHARED_MEMORY = Path("/dev/shm")


class Failure(NamedTuple):
    """Why a run failed, and the exit code that says so."""

    reason: str
    code: ExitCode


def failure_of(error: BaseException, otherwise: ExitCode) -> Failure:
    """The reason of an error with its place and remedy, and its exit code.

    Args:
        error: from a run or a command.
        otherwise: the code of errors that have none of their own.
    """
    disk = _disk_error(error)
    if disk is None:
        return Failure(_text(error), ExitCode(getattr(error, "exit_code", otherwise)))
    return Failure(_disk_text(error, disk), ExitCode(getattr(error, "exit_code", ExitCode.DISK)))


def _disk_error(error: BaseException | None) -> OSError | None:
    """The system's own error, which a library may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _text(error: BaseException) -> str:
    """Its message; errors that no user causes also get their type."""
    meant = isinstance(error, ValueError | RuntimeError | OSError) and str(error)
    return str(error) if meant else f"{type(error).__name__}: {error}"


def _disk_text(error: BaseException, disk: OSError) -> str:
    if disk is not error:
        return _text(error)
    if disk.filename is None:
        place = f"a file whose name the system did not give ({_suspects()})"
    else:
        place = f"{disk.filename}{_free(Path(os.fsdecode(disk.filename)))}"
    fix = "free some disk space" if disk.errno in FULL else "make that file system writable"
    return f"{disk.strerror or disk}: {place}; {fix}, and rerun the same command to resume"


def _free(path: Path) -> str:
    folder = next((each for each in (path, *path.parents) if each.exists()), None)
    return "" if folder is None else f", {shutil.disk_usage(folder).free} bytes free"


def _suspects() -> str:
    """The folders that libraries write to by themselves, with what is wrong with each."""
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()), Path.cwd())
    return "; ".join(f"{place} is {_state(place)}" for place in dict.fromkeys(places))


def _state(folder: Path) -> str:
    if not os.access(folder, os.W_OK):
        return "not writable"
    return f"writable, {shutil.disk_usage(folder).free} bytes free"
