"""The write-ahead journal of a sweep: intended and submitted jobs, and how each run ended."""

import json
import os
import time
from pathlib import Path

from trainer.record import Row, number, read_rows


class Journal:
    """Appends rows to `journal.jsonl`; the launcher and jobs on any host may write at once."""

    def __init__(self, sweep: Path) -> None:
        self._file = sweep / "journal.jsonl"

    def write(self, event: str, **facts: str | int | float | None) -> None:
        """Append one row and fsync it."""
        row = {"event": event, **facts, "pid": os.getpid(), "written": time.time()}
        line = (json.dumps(row) + "\n").encode()
        # One write with O_APPEND keeps lines whole, however many processes write.
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)

    def rows(self) -> list[Row]:
        """Every row, oldest first."""
        return read_rows(self._file)

    def failures(self, since: float) -> dict[str, str]:
        """The first error of each run that failed since a time and has not finished since then."""
        failed: dict[str, str] = {}
        for row in self.rows():
            name = str(row.get("run", ""))
            if row["event"] == "failed" and number(row, "written") >= since:
                # The first error is the cause; ranks that lost a peer report theirs later.
                failed.setdefault(name, str(row.get("error")))
            elif row["event"] == "ended":
                failed.pop(name, None)
        return failed
