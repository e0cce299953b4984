"""How a stopped job ends: at once, unless the launcher submitted it to SLURM."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from launch.cluster import _local_pool, resources_of
from launch.job import RANK_VARIABLES, TrainJob, Unit
from sweeps.config import LauncherConfig
from sweeps.grammar import read_sweep_file
from tests.launch.command import ROOT
from trainer.exit_codes import ExitCode

LEAVE = """
from pathlib import Path
from launch.job import TrainJob, _leave
from launch.journal import Journal
job = TrainJob(Path(), (), None{arguments})
_leave(Journal(Path()), first=True, requeued=job.requeued)
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a SLURM job, with an scontrol that notes its calls in `called`."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* > {tmp_path}/called\n")
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "41", "PYTHONPATH": str(ROOT)}


def leave(allocation: dict[str, str], at: Path, arguments: str) -> subprocess.Popen[bytes]:
    code = LEAVE.format(arguments=arguments)
    return subprocess.Popen([sys.executable, "-c", code], env=allocation, cwd=at)


def test_a_stopped_run_in_an_allocation_of_the_user_ends_at_once(
    allocation: dict[str, str], tmp_path: Path
) -> None:
    assert leave(allocation, tmp_path, "").wait(100) == ExitCode.REQUEUE
    assert not (tmp_path / "called").exists()


def test_a_stopped_job_of_the_launcher_is_requeued(
    allocation: dict[str, str], tmp_path: Path
) -> None:
    leaving = leave(allocation, tmp_path, ", requeued=True")
    while not (tmp_path / "called").exists():
        assert leaving.poll() is None
        time.sleep(0.05)
    leaving.kill()
    leaving.wait()
    assert (tmp_path / "called").read_text() == "requeue 41\n"


def test_a_run_in_this_process_takes_no_rank_from_the_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "7")
    TrainJob(tmp_path, (), None).run_here()
    assert not set(RANK_VARIABLES) & set(os.environ)


def test_local_jobs_have_no_time_limit_and_are_never_requeued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted: list[TrainJob] = []
    executors: list[submitit.LocalExecutor] = []

    def note(executor: submitit.LocalExecutor, job: TrainJob, *_: object) -> None:
        executors.append(executor)
        submitted.append(job)

    monkeypatch.setattr("launch.cluster._submit", note)
    experiment = read_sweep_file(Path("sweeps/smoke.yaml"), ["also=[]"]).experiments[0]
    unit = Unit("unit", (experiment,))
    pool = _local_pool([unit], LauncherConfig(minutes=1), tmp_path)
    pool.start(resources_of(unit), (unit,))
    assert executors[0].parameters["timeout_min"] > 60 * 24 * 365
    assert not submitted[0].requeued
