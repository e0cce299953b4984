"""The write-ahead journal of a sweep: intended and submitted jobs, and how each run ended."""

import json
import os
import time
from pathlib import Path

from trainer.append_file import append_line_shared
from trainer.exit_codes import ExitCode
from trainer.failures import Failure
from trainer.record import Row

UNREADABLE = "unreadable"
"""The event of a line that a crash or a full disk left damaged."""


class Journal:
    """Appends rows to `journal.jsonl`; the launcher and jobs on any host may write at once."""

    def __init__(self, sweep: Path) -> None:
        self._file = sweep / "journal.jsonl"

    def write(self, event: str, **facts: str | int | float | None) -> None:
        """Append one row and fsync it.

        Raises:
            OSError: names the file; nothing was added to it.
        """
        row = {"event": event, **facts, "pid": os.getpid(), "written": time.time()}
        append_line_shared(self._file, json.dumps(row) + "\n")

    def mark(self) -> int:
        """The journal's present end, for a reader of later rows: clocks may be set back."""
        return self._content().rfind(b"\n") + 1

    def rows(self, since: int = 0) -> list[Row]:
        """Every row from a mark on, oldest first."""
        lines = self._content()[since:].split(b"\n")[:-1]
        return [_row(line) for line in lines]

    def failures(self, since: int) -> dict[str, Failure]:
        """The first error of each run that failed since a mark and has not finished since then."""
        failed: dict[str, Failure] = {}
        for row in self.rows(since):
            name = str(row.get("run", ""))
            if row["event"] == "failed":
                # The first error is the cause; ranks that lost a peer report theirs later.
                failure = Failure(str(row.get("error")), _code(row.get("code")))
                failed.setdefault(name, failure)
            elif row["event"] == "ended":
                failed.pop(name, None)
        return failed

    def _content(self) -> bytes:
        return self._file.read_bytes() if self._file.exists() else b""


def _row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return {"event": UNREADABLE}
    return row


def _code(value: object) -> ExitCode:
    return ExitCode(value) if value in set(ExitCode) else ExitCode.FAILED
