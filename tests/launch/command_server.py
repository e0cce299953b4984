"""Runs the project's commands in forks of a process that has loaded what their launcher loads.

python -m tests.launch.command_server    orders as JSON lines in, exit codes as lines out

A command spends four seconds of processor time on imports before it does anything. Each order gets
a fork of its own, with its words, environment and files, which runs the script as `python` would.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent


class CommandServer:
    """The server; it ends with the process that started it."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.launch.command_server"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], cwd: Path, folder: Path
    ) -> int:
        """Run `python WORDS` in `cwd`; it writes `out` and `err` in `folder`; returns its code."""
        order = {
            "words": words,
            "environment": dict(environment),
            "cwd": str(cwd),
            "folder": str(folder),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve() -> None:
    """Answer orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import launch.capsule
    import launch.generate
    import launch.swap
    import launch.sweep
    import launch.train  # noqa: F401

    # A fork that read from the same buffer would find the orders that follow.
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            answers.close()
            act(json.loads(line))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def act(order: Mapping[str, Any]) -> NoReturn:
    """Become the command, and end as it does."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(order["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.argv = order["words"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve()
