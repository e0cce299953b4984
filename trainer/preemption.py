"""How a run is asked to stop, how it shows that it is alive, and what its exit code says.

A signal only sets a flag; the loop reads it at the end of a step, all ranks agree, and the run is
saved. Watcher threads see to the case in which the main thread never gets there.
"""

import contextlib
import enum
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
HEARTBEAT_SECONDS = 1.0


class ExitCode(enum.IntEnum):
    """Why a process ended, for whoever started it; the launcher decides by it what happens next."""

    DONE = 0
    BAD_CONFIG = 64
    BAD_DATA = 65
    BAD_CHECKPOINT = 66
    NUMERIC_HALT = 70
    DISK = 71
    REQUEUE = 75
    HANG = 76
    INTERRUPTED = 130


class StopSignal:
    """A flag that USR2, TERM and INT set, within a `with` block on the main thread.

    Python runs a signal's handler on the main thread alone, which may sit in a collective for
    ever. So the interpreter also writes the signal's number to a socket that a thread reads: if
    the block is not left within the grace, that thread dumps all stacks and ends the process with
    `ExitCode.REQUEUE`. A second INT ends it at once, with nothing saved.

    Args:
        grace_seconds: from the first signal to the forced end; more than two saves and a step.
        stacks: where the stacks go before a forced end.
        before_forced_end: told why; runs on the watcher thread, and nothing it does delays the
            end by more than what it takes itself.
    """

    def __init__(
        self, grace_seconds: float, stacks: Path, before_forced_end: Callable[[str], None]
    ) -> None:
        self._grace_seconds = grace_seconds
        self._stacks = stacks
        self._before_forced_end = before_forced_end
        self._asked = threading.Event()
        self._interrupts = 0
        self._name = ""

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    @property
    def name(self) -> str:
        """The first signal that asked for it, or nothing."""
        return self._name

    def __enter__(self) -> Self:
        global _active
        assert _active is None, "a StopSignal is in force already"
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        self._thread = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._thread.start()
        _active = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _active
        _active = None
        self.restore()
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def restore(self) -> None:
        """Put the handlers back that were in force before."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if not self._asked.is_set():
            self._name = signal.Signals(number).name
            self._asked.set()

    def _watch(self) -> None:
        """Read signal numbers until the block is left or the grace has passed."""
        deadline = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self._reader.settimeout(left)
            try:
                received = self._reader.recv(64)
            except TimeoutError:
                self._force_end()
                return
            if not received:
                return
            for number in filter(STOP_SIGNALS.__contains__, received):
                self._note(number, None)
                self._interrupts += number == signal.SIGINT
                deadline = deadline or time.monotonic() + self._grace_seconds
            if self._interrupts > 1:
                os._exit(ExitCode.INTERRUPTED)

    def _force_end(self) -> None:
        message = (
            f"{self._name} came {self._grace_seconds:g} s ago and no step has ended since; "
            f"process {os.getpid()} ends without a save, its stacks are in {self._stacks}"
        )
        try:
            _dump_stacks(self._stacks, message)
            self._before_forced_end(message)
        finally:
            os._exit(ExitCode.REQUEUE)


@dataclass(frozen=True)
class Beat:
    """What a rank was doing, and when it said so."""

    step: int
    phase: str
    monotonic: float
    written: str


class Heartbeat:
    """Shows, within a `with` block, where a rank is: `heartbeat-<rank>.json`, once a second.

    When no beat comes for a phase's deadline, the stacks of all threads go to `stall-<rank>.txt`
    and `report` is told, once until the next beat. The process is not ended: a save to a slow disk
    looks the same. A call that holds the interpreter's lock silences both; then the file's age
    is what tells.

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
        """Say that this rank is alive and enters a phase; costs no system call but the clock's."""
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
                self._tell_stall(beat, now)
                stalled = beat

    def _show(self, beat: Beat) -> None:
        """Replace the file, without fsync: it says what is, not what must last."""
        partial = self._file.with_name(f"{self._file.name}.partial")
        try:
            partial.write_text(json.dumps({"rank": self._rank, **asdict(beat)}) + "\n")
            partial.replace(self._file)
        except OSError as error:
            self._report(f"heartbeat of rank {self._rank} cannot be written: {error}")

    def _tell_stall(self, beat: Beat, now: float) -> None:
        message = (
            f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()}) has been in phase "
            f"{beat.phase!r} of step {beat.step} for {now - beat.monotonic:.1f} s, longer than "
            f"{self._deadlines[beat.phase]:g} s; stacks: {self._stacks}"
        )
        with contextlib.suppress(OSError):
            _dump_stacks(self._stacks, message)
        self._report(message)


def _dump_stacks(file: Path, title: str) -> None:
    with file.open("w") as opened:
        opened.write(f"{title}\n")
        opened.flush()
        faulthandler.dump_traceback(file=opened, all_threads=True)


def _forget_in_child() -> None:
    """A forked loader worker must not answer for the run: its signals would stop the parent."""
    global _active
    if _active is not None:
        _active.restore()
        _active = None


_active: StopSignal | None = None
os.register_at_fork(after_in_child=_forget_in_child)
