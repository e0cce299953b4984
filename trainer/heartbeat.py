"""A file with each rank's current step and phase, and stack dumps of a rank that stalls."""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Beat:
    """The step and phase a rank was in, and when."""

    step: int
    phase: str
    monotonic: float
    written: str


class Heartbeat:
    """Writes a rank's step and phase to `heartbeat-<rank>.json` once a second, in a `with` block.

    If a phase exceeds its deadline, the stacks of all threads go to `stall-<rank>.txt` and `report`
    is called, once until the next beat. The process is not ended: a save to a slow disk looks the
    same. A call that holds the GIL silences both; the age of the file then reveals the stall.

    Args:
        deadlines: seconds a phase may last, by its name; the first phase is where it starts.
    """

    def __init__(
        self, folder: Path, rank: int, deadlines: Mapping[str, float], report: Callable[[str], None]
    ) -> None:
        self._file = folder / f"heartbeat-{rank}.json"
        self._stacks = folder / f"stall-{rank}.txt"
        self._rank = rank
        self._deadlines = dict(deadlines)
        self._report = report
        self._left = threading.Event()
        self._beat = self._now(0, next(iter(deadlines)))

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._left.set()
        self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Enter a phase; costs no system call but the clock's, so it can be called every step."""
        assert phase in self._deadlines, f"phase {phase!r} has no deadline"
        self._beat = self._now(step, phase)

    def _now(self, step: int, phase: str) -> Beat:
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Beat(step, phase, time.monotonic(), written)

    def _watch(self) -> None:
        shown = stalled = None
        # A deadline is noticed within a quarter of itself.
        pause = min(HEARTBEAT_SECONDS, *(each / 4 for each in self._deadlines.values()))
        next_show = 0.0
        while True:
            left = self._left.wait(pause)
            beat, now = self._beat, time.monotonic()
            if beat is not shown and (left or now >= next_show):
                self._show(beat)
                shown, next_show = beat, now + HEARTBEAT_SECONDS
            if left:
                return
            if beat is not stalled and now - beat.monotonic > self._deadlines[beat.phase]:
                self._report_stall(beat, now)
                stalled = beat

    def _show(self, beat: Beat) -> None:
        """Replace the file, without fsync: it need not survive a crash."""
        partial = self._file.with_name(f"{self._file.name}.partial")
        try:
            partial.write_text(json.dumps({"rank": self._rank, **asdict(beat)}) + "\n")
            partial.replace(self._file)
        except OSError as error:
            self._report(f"heartbeat of rank {self._rank} cannot be written: {error}")

    def _report_stall(self, beat: Beat, now: float) -> None:
        message = (
            f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()}) has been in phase "
            f"{beat.phase!r} of step {beat.step} for {now - beat.monotonic:.1f} s, longer than "
            f"{self._deadlines[beat.phase]:g} s; stacks: {self._stacks}"
        )
        with contextlib.suppress(OSError):
            dump_stacks(self._stacks, message)
        self._report(message)


def dump_stacks(file: Path, title: str) -> None:
    """Write the stack of every thread of this process, under a title."""
    with file.open("w") as opened:
        opened.write(f"{title}\n")
        opened.flush()
        faulthandler.dump_traceback(file=opened, all_threads=True)
