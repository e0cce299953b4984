"""Files of lines: a write is whole or absent, and a torn end is set aside by the next writer."""

import errno
import multiprocessing
import os
from contextlib import closing
from pathlib import Path

import pytest

import trainer.append_file
from launch.journal import Journal
from trainer.append_file import AppendFile, Seal, append_line_shared
from trainer.exit_codes import ExitCode

TORN = ["", "{", '{"event": "fai', '{"event": "ended", "run": "a"}', "\0\0\0", "x" * 200_000]


@pytest.fixture(params=["alone", "shared"])
def append(request: pytest.FixtureRequest):
    """Appends a line as a single writer does, or as one of several."""

    def alone(path: Path, line: str) -> None:
        with closing(AppendFile(path)) as file:
            file.append(line)

    return alone if request.param == "alone" else append_line_shared


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("before", ["", "one\n", "one\ntwo\n"])
def test_a_torn_end_is_set_aside_before_the_next_line(
    tmp_path: Path, append, before: str, torn: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(before + torn)
    append(file, "three\n")
    assert file.read_text() == before + "three\n"
    aside = tmp_path / "rows.jsonl.torn"
    assert (aside.read_text() if aside.exists() else "") == (torn + "\n" if torn else "")


def short_then(monkeypatch: pytest.MonkeyPatch, outcome: type[OSError] | None) -> None:
    """Let the disk take five bytes, then the rest or nothing."""
    write, calls = os.write, []

    def short(file: int, content: bytes) -> int:
        calls.append(file)
        if len(calls) == 1:
            return write(file, content[:5])
        if outcome is not None:
            raise outcome(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    monkeypatch.setattr(trainer.append_file.os, "write", short)


def test_a_short_write_is_completed(
    tmp_path: Path, append, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_then(monkeypatch, None)
    append(tmp_path / "rows.jsonl", "a long enough line\n")
    assert (tmp_path / "rows.jsonl").read_text() == "a long enough line\n"


def test_a_short_write_on_a_full_disk_leaves_no_part(
    tmp_path: Path, append, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("one\n")
    short_then(monkeypatch, OSError)
    with pytest.raises(OSError, match="No space left") as raised:
        append(file, "a long enough line\n")
    assert raised.value.filename == str(file)
    assert file.read_text() == "one\n"


def test_a_disk_that_takes_nothing_and_says_nothing_is_an_error(
    tmp_path: Path, append, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.append_file.os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="No space left"):
        append(tmp_path / "rows.jsonl", "line\n")


def test_a_seal_holds_while_a_file_grows_and_for_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with closing(AppendFile(path)) as file:
        empty = file.seal
        file.append("one\ntwo\n")
        sealed = file.seal
        file.append("three\n")
        assert sealed.holds(path)
    with closing(AppendFile(path)) as again:
        assert again.seal != sealed
    assert sealed.holds(path)
    assert empty == Seal(0, empty.sha256)
    for changed in ("one\ntw", "one\n", "", "two\none\n", "one\nTwo\nthree\n"):
        path.write_text(changed)
        assert not sealed.holds(path)
        assert empty.holds(path)
    path.unlink()
    assert not sealed.holds(path)


@pytest.mark.parametrize("torn", TORN)
def test_a_journal_with_a_torn_end_is_read_and_goes_on(tmp_path: Path, torn: str) -> None:
    journal = Journal(tmp_path)
    journal.write("failed", run="a", error="first", code=71)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(torn)
    assert [row["event"] for row in journal.rows()] == ["failed"]
    journal.write("ended", run="b")
    assert [row["event"] for row in journal.rows()] == ["failed", "ended"]
    assert journal.failures(0)["a"] == ("first", ExitCode.DISK)


@pytest.mark.parametrize("line", ["{", "[]", "3", "null", '{"run": "a"}', '{"event": 3}', "\xff"])
def test_a_damaged_line_inside_a_journal_hides_no_other(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path)
    journal.write("failed", run="a", error="first")
    with (tmp_path / "journal.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    journal.write("ended", run="b")
    assert [row["event"] for row in journal.rows()] == ["failed", "unreadable", "ended"]


def test_failures_are_those_after_a_mark_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.write("failed", run="old", error="before")
    mark = journal.mark()
    monkeypatch.setattr("launch.journal.time.time", lambda: 0.0)
    journal.write("failed", run="new", error="after", code=66)
    assert journal.failures(mark) == {"new": ("after", ExitCode.BAD_CHECKPOINT)}


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_write_some, [(tmp_path, worker) for worker in range(4)])
    rows = Journal(tmp_path).rows()
    assert sorted((row["worker"], row["place"]) for row in rows) == [
        (worker, place) for worker in range(4) for place in range(25)
    ]


def _write_some(folder: Path, worker: int) -> None:
    for place in range(25):
        Journal(folder).write("ended", worker=worker, place=place, text="x" * 500)
