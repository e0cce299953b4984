"""Worker processes of a build: results in the order of the tasks, and no orphans."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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
            raise RuntimeError(
                "a process of the build was killed from outside, perhaps for lack of memory; "
                "rerun the build, finished stages are kept"
            ) from error
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _pool(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_die_with, initargs=(os.getpid(),)
            )
        return self._executor


@contextlib.contextmanager
def open_workers(processes: int) -> Iterator[Workers]:
    """Workers that are stopped when the block ends."""
    workers = Workers(processes)
    try:
        yield workers
    finally:
        workers.close()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, which a pool alone does not do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before prctl took effect.
    if os.getppid() != parent:
        os._exit(1)
