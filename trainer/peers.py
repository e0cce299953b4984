"""What became of the other ranks of a run: a collective only says that a connection was closed."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.exit_codes import ExitCode

NOTICE_SECONDS = 2.0
"""How long after a failed collective the end of a peer is waited for."""
_EXIT_STATUS = 51 - 2
"""Place of the exit status in /proc/<pid>/stat, counted after the name in parentheses."""


class RankLostError(RuntimeError):
    """Another rank ended, so that this one could not go on."""

    exit_code = ExitCode.FAILED


class HangError(RuntimeError):
    """A collective waited for its peers until its time was over."""

    exit_code = ExitCode.HANG


class Place(NamedTuple):
    """Where a rank runs."""

    rank: int
    host: str
    process: int


def own_place(rank: int) -> Place:
    """Where this rank runs."""
    return Place(rank, socket.gethostname(), os.getpid())


class Peers:
    """Watches the processes of other ranks on this machine, in a thread that ends with it."""

    def __init__(self, own: Place, every: Sequence[Place]) -> None:
        self._ended: dict[int, str] = {}
        self._there: dict[int, Place] = {}
        for place in every:
            if place.host == own.host and place.rank != own.rank:
                self._watch(place)
        if self._there:
            threading.Thread(target=self._wait, name="peers", daemon=True).start()

    def explain(self, error: Exception) -> Exception:
        """The error itself, or why a rank that waited for others could not go on."""
        if not isinstance(error, RuntimeError) or hasattr(error, "exit_code"):
            return error
        text = " ".join(str(error).split())
        deadline = time.monotonic() + (NOTICE_SECONDS if self._there else 0)
        while not self._ended and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._ended:
            lost = "; ".join(self._ended[rank] for rank in sorted(self._ended))
            return RankLostError(
                f"{lost}; its log in the sweep's jobs folder may say why; rerun the same command "
                f"to resume (this rank's error: {text})"
            )
        if "timed out" in text.lower():
            return HangError(
                f"a rank did not answer in time: {text}; see stall-<rank>.txt in the run's folder "
                "for where each waited; rerun the same command to resume"
            )
        return error

    def _watch(self, place: Place) -> None:
        try:
            self._there[os.pidfd_open(place.process)] = place
        except OSError:
            self._ended[place.rank] = f"rank {place.rank} (process {place.process}) has ended"

    def _wait(self) -> None:
        poll = select.poll()
        for handle in self._there:
            poll.register(handle, select.POLLIN)
        left = dict(self._there)
        while left:
            for handle, _ in poll.poll():
                place = left.pop(handle)
                poll.unregister(handle)
                self._ended[place.rank] = (
                    f"rank {place.rank} (process {place.process} on {place.host}) "
                    f"{_how(place.process)}"
                )
                os.close(handle)


def _how(process: int) -> str:
    """How a process ended, if its parent has not asked yet."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        status = int(fields[_EXIT_STATUS])
        if os.WIFSIGNALED(status):
            return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"ended with exit code {os.WEXITSTATUS(status)}"
    return "has ended"
