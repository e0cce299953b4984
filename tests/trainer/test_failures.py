"""The line and the exit code of an error: where it struck, and what to do."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

import trainer.failures
from trainer.checkpoint import SaveError, SaveFailure
from trainer.exit_codes import ExitCode
from trainer.failures import failure_of
from trainer.identity import IdentityError
from trainer.manifest import CheckpointError
from trainer.schema import ConfigError

DISK = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("number", DISK)
def test_a_disk_error_names_its_file_and_a_remedy(tmp_path: Path, number: int) -> None:
    file = tmp_path / "not" / "there"
    reason, code = failure_of(OSError(number, os.strerror(number), str(file)), ExitCode.BAD_CONFIG)
    assert code == ExitCode.DISK
    assert str(file) in reason
    assert "bytes free" in reason
    assert "rerun the same command" in reason
    assert "Errno" not in reason


@pytest.mark.parametrize("number", DISK)
def test_a_disk_error_without_a_file_names_the_folders_that_libraries_write_to(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.failures.os, "access", lambda place, _: place != Path("/dev/shm"))
    reason, code = failure_of(OSError(number, os.strerror(number)), ExitCode.BAD_CONFIG)
    assert code == ExitCode.DISK
    assert "/dev/shm is not writable" in reason
    assert f"{tempfile.gettempdir()} is writable" in reason


def test_a_disk_error_inside_a_librarys_own_keeps_its_code() -> None:
    error = RuntimeError("cannot write the archive to /x")
    error.__cause__ = OSError(errno.ENOSPC, "full", "/x")
    found = failure_of(error, ExitCode.FAILED)
    assert found == ("cannot write the archive to /x", ExitCode.DISK)


def test_errors_that_know_their_code_keep_it_and_others_get_the_callers() -> None:
    failure = SaveFailure(4, 0, "x", errno.ENOSPC, "full", 2, 1)
    cases = [
        (SaveError(failure), ExitCode.DISK),
        (CheckpointError("none", "x"), ExitCode.BAD_CHECKPOINT),
        (IdentityError("x"), ExitCode.BAD_CHECKPOINT),
        (ConfigError("x"), ExitCode.BAD_CONFIG),
        (FileNotFoundError(errno.ENOENT, "x", "y"), ExitCode.BAD_CONFIG),
        (KeyError("x"), ExitCode.BAD_CONFIG),
    ]
    assert [failure_of(e, ExitCode.BAD_CONFIG).code for e, _ in cases] == [c for _, c in cases]


def test_an_error_that_no_user_causes_says_its_type() -> None:
    assert failure_of(KeyError("x"), ExitCode.FAILED).reason == "KeyError: 'x'"
    assert failure_of(ZeroDivisionError(), ExitCode.FAILED).reason == "ZeroDivisionError: "
    assert failure_of(ValueError("a is b"), ExitCode.FAILED).reason == "a is b"
