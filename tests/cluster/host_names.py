"""Names of the cluster's nodes in /etc/hosts: the ranks of a run meet at that of its first node."""

import fcntl
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import psutil

HOSTS = Path("/etc/hosts")
MARK = "crossladder-slurm"
_OURS = re.compile(rf"# {MARK} (\d+)\s*$")


def add_names(nodes: tuple[str, ...]) -> None:
    """Make the nodes' names resolve to this machine, until this process removes them or is dead.

    Raises:
        RuntimeError: they are the names of other machines.
    """
    line = f"127.0.0.1 {' '.join(nodes)} # {MARK} {os.getpid()}\n"
    _rewrite(lambda lines: [*without_dead(lines), line])
    taken = [node for node in nodes if not _resolves(node)]
    if taken:
        raise RuntimeError(
            f"{', '.join(taken)} should be this machine, but is another in {HOSTS}; rename it there"
        )


def remove_names() -> None:
    """Take this process's line away."""
    mine = str(os.getpid())
    _rewrite(lambda lines: [line for line in lines if _owner(line) != mine])


def without_dead(lines: list[str]) -> list[str]:
    """The lines but those of processes that were killed before they could take theirs away."""
    return [line for line in lines if (pid := _owner(line)) is None or psutil.pid_exists(int(pid))]


def _owner(line: str) -> str | None:
    found = _OURS.search(line)
    return found.group(1) if found else None


def _rewrite(change: Callable[[list[str]], list[str]]) -> None:
    # In a container the file is mounted: it can be written, but not replaced.
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        after = "".join(change(before.splitlines(keepends=True)))
        file.seek(0)
        file.write(after)
        file.truncate()


def _resolves(name: str) -> bool:
    try:
        return socket.gethostbyname(name) == "127.0.0.1"
    except OSError:
        return False
