"""Runs the project's commands as a user does, or in forks that are spared the imports."""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.launch.command_server import ROOT, CommandServer


def command(*words: str, fault: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment(fault),
        capture_output=True,
        text=True,
        check=False,
    )


def forked(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`, a script, to its end in a fork that has imported what a launcher does."""
    with tempfile.TemporaryDirectory() as folder:
        code = _server().run(words, environment(""), cwd, Path(folder))
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(words, code, out, err)


@functools.cache
def _server() -> CommandServer:
    server = CommandServer()
    atexit.register(server.close)
    return server


def start(*words: str) -> subprocess.Popen[bytes]:
    """Start `python WORDS` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def environment(fault: str) -> dict[str, str]:
    """This process's environment, with a fault to inject."""
    return {**os.environ, "CROSSLADDER_FAULT": fault}
