"""Worker processes of a build: results in the order of the tasks, and no orphans."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1
AHEAD = 2
"""Tasks submitted ahead of the next result, as a multiple of the processes."""


class Workers:
    """Runs tasks in spawned processes, or in this one if there is to be one process."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None
        self._started: Mapping[int, BaseProcess] = {}

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of the tasks.

        Tasks are drawn as results are taken, so an abandoned iteration leaves later ones undone.

        Raises:
            RuntimeError: a process died.
        """
        if self._processes == 1:
            yield from map(function, tasks)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(self._pool().submit(function, task))
                if len(pending) > AHEAD * self._processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"a process of the build {self._ended()}") from error
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _ended(self) -> str:
        """How the first process ended; the pool then ends the others with SIGTERM."""
        self.close()
        codes = [process.exitcode for process in self._started.values()]
        return how_it_ended(next((c for c in codes if c not in (0, -signal.SIGTERM)), codes[0]))

    def _pool(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)
            )
            # The same dictionary, which the executor fills and lets go when it breaks.
            self._started = self._executor._processes
        return self._executor


@contextlib.contextmanager
def open_workers(processes: int) -> Iterator[Workers]:
    """Workers that are stopped when the block ends."""
    workers = Workers(processes)
    try:
        yield workers
    finally:
        workers.close()


def how_it_ended(code: int | None) -> str:
    """How a process of a build ended that sent no error, and what to do."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
        crash = " by itself" if name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL") else ""
        how = f"crashed{crash} with {name}" if crash else f"was killed by {name}{memory}"
        return f"{how}; rerun the same command to resume, finished stages are kept"
    return (
        f"ended with exit code {code}, and not from outside; its own error is printed above: "
        "correct that, then rerun"
    )


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, which a pool alone does not do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before prctl took effect.
    if os.getppid() != parent:
        os._exit(1)
