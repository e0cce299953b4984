"""Processes over gloo, started once for everything that is asked of them."""

import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

Answer = TypeVar("Answer")
SECONDS = 1800.0
"""After which ranks that have not ended are killed."""


def on_ranks(size: int, action: Callable[[dist.ProcessGroup], Answer]) -> Answer:
    """Do something on every rank of a new group; return what the first one gives.

    Raises:
        RuntimeError: a rank failed or did not end.
    """
    # Children of a server that has imported everything start in a tenth of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sequence_parallel.compare"])
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_act, args=(rank, size, Path(folder), action))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        codes = _ends(children)
        if any(codes):
            raise RuntimeError(
                f"{size} ranks ended with the codes {codes} (-9: killed after {SECONDS:.0f} s)"
            )
        # Written by our own child, in a folder of our own.
        return pickle.loads((Path(folder) / "answer").read_bytes())


def _ends(children: Sequence[BaseProcess]) -> list[int | None]:
    deadline = time.monotonic() + SECONDS
    while any(child.exitcode is None for child in children) and time.monotonic() < deadline:
        if any(child.exitcode for child in children):
            break
        time.sleep(0.02)
    for child in children:
        child.join(1.0)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _act(rank: int, size: int, folder: Path, action: Callable[[dist.ProcessGroup], object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None, "the group was just made"
    answer = action(group)
    if rank == 0:
        (folder / "answer").write_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
