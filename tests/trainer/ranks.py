"""Actions on several gloo ranks, each forked from a server that has everything imported."""

import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

import data_pipelines.fault_points
from tests.trainer.study import rebind_faults

PRELOADED = ("deepspeed", "streaming", "tests.trainer.ranks")
SECONDS = 480.0
"""After which ranks that have not ended are killed."""


def on_ranks(
    ranks: int, action: Callable[[], object], faults: Sequence[str] = ()
) -> list[int | None]:
    """Do something on every rank of a new group; returns how each ended, negative if killed.

    Args:
        ranks: processes of the group.
        action: can be pickled.
        faults: of the ranks, as `CROSSLADDER_FAULT` names them; none where there are fewer.
    """
    port, every = _free_port(), [*faults, *[""] * ranks]
    context = _server()
    children = [
        context.Process(target=_act, args=((rank, ranks, port), action, every[rank]))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    return _ends(children)


def _server() -> ForkServerContext:
    # DeepSpeed decides on its accelerator when it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _ends(children: Sequence[BaseProcess]) -> list[int | None]:
    deadline = time.monotonic() + SECONDS
    for child in children:
        child.join(max(deadline - time.monotonic(), 0.1))
    for child in children:
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _act(place: tuple[int, int, int], action: Callable[[], object], fault: str) -> None:
    rank, ranks, port = place
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    os.environ["CROSSLADDER_FAULT"] = fault
    importlib.reload(data_pipelines.fault_points)
    rebind_faults()
    action()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
