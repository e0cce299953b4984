"""Runs the project's commands as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


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
