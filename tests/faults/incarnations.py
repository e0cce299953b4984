"""Starts incarnations of a run: a server that has loaded everything forks one for each order.

python -m tests.faults.incarnations      orders as JSON lines in, exit codes as lines out
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent.parent


class Incarnations:
    """The server, held by a test."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-W", "ignore", "-m", "tests.faults.incarnations"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def start(self, job: str, fault: str = "") -> int:
        """Run a pickled TrainJob in a fresh fork, under a fault; returns its exit code."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"job": job, "fault": fault}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def serve() -> None:
    """Answer orders until there are no more."""
    import os
    import pickle

    # Libraries print; what they print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import deepspeed  # noqa: F401
    import streaming  # noqa: F401

    from tests.trainer.study import in_child
    from trainer.train import train  # noqa: F401

    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        job = pickle.loads(Path(order["job"]).read_bytes())
        answers.write(f"{in_child(job.run, order['fault'])}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
