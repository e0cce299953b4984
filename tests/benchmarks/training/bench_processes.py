"""The processes of the benchmark: each contender trains in one of its own, which can be stopped."""

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sweeps.rungs import RUNGS
from tests.benchmarks.training.bench_models import (
    RATE,
    THREADS,
    Built,
    Size,
    Task,
    bare,
    build_engine,
    engine,
    random_batch,
)
from tests.benchmarks.training.bench_peers import llama, their_mamba
from trainer.checkpoint import Draft, SaveFailure, publish
from trainer.config import ExecutionConfig
from trainer.engine import Engine, prepare_process
from trainer.machine import keep_freed_memory
from trainer.parallel import SoloGroup
from trainer.record import RunRecord

CONTENDERS: dict[tuple[str, str], Callable[[Task], Built]] = {
    ("transformer", "bare"): bare,
    ("transformer", "engine"): engine,
    ("transformer", "transformers"): llama,
    ("mamba", "bare"): bare,
    ("mamba", "engine"): engine,
    ("mamba", "transformers"): their_mamba,
}
"""By architecture and implementation; the order of a round."""


class Child:
    """A function in a process of its own, which is started anew after it was stopped."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        self._function, self._arguments = function, arguments
        self._start()

    def ask(self, question: object) -> None:
        """Hand it a question, which `answer` waits for."""
        if not self._process.is_alive():
            self._start()
        self._connection.send(question)

    def answer(self, limit: float) -> Any:
        """What it sends next, or None if that takes too long; then the process is gone."""
        if not self._connection.poll(limit):
            self.stop()
            return None
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"{self._function.__name__}{self._arguments} ended with exit code "
                f"{self._process.exitcode}; its error stands above"
            ) from None

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        # Forked from a process that has imported torch and done nothing else, which saves seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        arguments = (theirs, *self._arguments)
        self._process = context.Process(target=self._function, args=arguments, daemon=True)
        self._process.start()
        theirs.close()


def serve(connection: Connection, contender: tuple[str, str]) -> None:
    """Serve one of the contenders by its name."""
    serve_made(connection, CONTENDERS[contender])


def serve_made(connection: Connection, make: Callable[[Task], Built]) -> None:
    """Answer each `Task` with (parameters, setting) and each "step" with (seconds, loss)."""
    prepare_threads()
    if make is engine:
        prepare_process(ExecutionConfig(threads=THREADS, device="cpu"))
    built = None
    for request in _questions(connection):
        if isinstance(request, Task):
            if built is not None:
                built.close()
            built = None
            gc.collect()
            built = make(request)
            connection.send((built.parameters, built.setting))
            continue
        assert built is not None, "a step was asked for before anything was built"
        begin = time.perf_counter()
        loss = built.step()
        connection.send((time.perf_counter() - begin, loss))


def serve_costs(connection: Connection, repeats: int, folder: Path) -> None:
    """Send what a run of the smallest rung costs beside its steps: start-ups, then saves."""
    prepare_threads()
    prepare_process(ExecutionConfig(threads=THREADS, device="cpu"))
    smallest = min(RUNGS.values(), key=lambda rung: rung.d_model)
    size = Size(smallest, seq_len=256, batch=8)
    task, batch = Task(size.shape("transformer"), size), random_batch(size)
    start_ups = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run = build_engine(task)
        run.step(batch, RATE)
        start_ups.append(time.perf_counter() - begin)
        run.close()
    run = build_engine(task)
    run.step(batch, RATE)
    connection.send((start_ups, [_save(run, step, folder) for step in range(1, repeats + 1)]))
    run.close()


def prepare_threads() -> None:
    """As in a run: freed memory is kept, all cores, and no denormals.

    The last two come before the first parallel region starts its threads.
    """
    keep_freed_memory()
    # numpy examines its float types at their first use, and warns where denormals are flushed.
    for kind in (np.float32, np.float64):
        str(np.finfo(kind))  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)


def _questions(connection: Connection) -> Iterator[Any]:
    """What the benchmark asks, until it ends."""
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _save(run: Engine, step: int, folder: Path) -> float:
    """Seconds of one published checkpoint, in a run folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as path,
        closing(RunRecord(Path(path))) as record,
    ):
        begin = time.perf_counter()
        draft = Draft(step, {"tokens": step}, pinned=False, write=run.save)
        saved = publish(record.checkpoints, draft, SoloGroup(), record)
        seconds = time.perf_counter() - begin
    if isinstance(saved, SaveFailure):
        raise RuntimeError(str(saved))
    return seconds
