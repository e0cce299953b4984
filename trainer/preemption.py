"""How a signal stops a run.

A signal only sets a flag. The loop reads it at the end of a step, all ranks agree, and the run is
saved. A watcher thread ends the process if the main thread never gets there.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from trainer.exit_codes import ExitCode
from trainer.heartbeat import dump_stacks

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A flag that USR2, TERM and INT set, within a `with` block on the main thread.

    Python runs signal handlers on the main thread only, which may be blocked in a collective
    forever. So the interpreter also writes the signal's number to a socket that a thread reads: if
    the block is not left within the grace period, that thread dumps all stacks and ends the process
    with `ExitCode.REQUEUE`. A second INT ends it at once, without saving.

    Args:
        grace_seconds: from the first signal to the forced end; more than two saves and a step.
        stacks: where the stacks go before a forced end.
        before_forced_end: called with the reason, on the watcher thread; the process ends when it
            returns or raises.
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
        """Whether a stop was requested."""
        return self._asked.is_set()

    @property
    def name(self) -> str:
        """The name of the first signal that requested it, or an empty string."""
        return self._name

    def __enter__(self) -> Self:
        global _active
        assert _active is None, "a StopSignal is in force already"
        self._reader, self._writer = socket.socketpair()
        # A full socket must not block the signal handler; set_wakeup_fd requires non-blocking.
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
        """Restore the previous signal handlers."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if not self._asked.is_set():
            self._name = signal.Signals(number).name
            self._asked.set()

    def _watch(self) -> None:
        """Read signal numbers until the block is left or the grace period has passed."""
        deadline = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self._reader.settimeout(left)
            try:
                received = self._reader.recv(64)
            except TimeoutError:
                self._force_end()
                return
            # The block was left: `__exit__` has closed the other end.
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
            f"{self._name} was received {self._grace_seconds:g} s ago and no step has ended since; "
            f"process {os.getpid()} exits without saving, its stacks are in {self._stacks}"
        )
        # sys.exit would only end this thread, and cleanup could block on the hung main thread.
        try:
            dump_stacks(self._stacks, message)
            self._before_forced_end(message)
        finally:
            os._exit(ExitCode.REQUEUE)


def _forget_in_child() -> None:
    """Restore signals in a forked worker: its copy of the socket would stop the parent."""
    global _active
    if _active is not None:
        _active.restore()
        _active = None


_active: StopSignal | None = None
os.register_at_fork(after_in_child=_forget_in_child)
