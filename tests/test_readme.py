"""The README's commands, run in their fast form."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.command import ROOT, command

TEXT = (ROOT / "README.md").read_text()
LINES = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
SWEEPS = [line for line in LINES if line.startswith("python launch/sweep.py")]
TRAINS = [line for line in LINES if line.startswith("python launch/train.py")]
MAKES = [line for line in LINES if line.startswith("make")]


def test_every_command_is_one_that_is_tested() -> None:
    assert sorted(LINES) == sorted([*SWEEPS, *TRAINS, *MAKES])
    assert len(SWEEPS) >= 6
    assert TRAINS
    assert MAKES


@pytest.mark.parametrize("line", SWEEPS)
def test_sweep_commands_plan(line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if word not in ("--plan", "--status")]
    ended = command(*words, "--plan")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "tokens to train" in " ".join(ended.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("line", TRAINS)
def test_train_commands_train(line: str, tmp_path: Path) -> None:
    small = ("budget.tokens=8192", "dataset.name=small", "corpus.dataset=small")
    data = ("dataset.domain_bytes=1000000", f"execution.data_root={tmp_path}")
    words = [*shlex.split(line)[1:], *small, *data, "evaluation.milestones=[]"]
    ended = command(*words, "--runs", str(tmp_path / "runs"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bits per byte" in ended.stdout


@pytest.mark.parametrize("line", MAKES)
def test_make_targets_exist(line: str) -> None:
    asked = subprocess.run(
        ["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, check=False
    )
    assert asked.returncode == 0, asked.stderr


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([A-Za-z_/.]+)\)", TEXT):
        assert (ROOT / name).exists(), name
