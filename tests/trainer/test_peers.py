"""A rank that lost another one says which, and how it ended."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.job import TrainJob, Unit
from launch.journal import Journal
from tests.launch.command import ROOT
from tests.trainer.ranks import on_ranks
from tests.trainer.study import at_budget, build_tiny, make
from trainer.exit_codes import ExitCode
from trainer.manifest import CheckpointError
from trainer.peers import HangError, Peers, Place, RankLostError, own_place
from trainer.record import read_json
from trainer.schema import dump

SLEEP = "import time; time.sleep(30)"


def ended(words: list[str], number: int | None) -> Exception:
    """What a rank is told of a peer that ends by a signal, or by itself."""
    child = subprocess.Popen([sys.executable, "-c", *words])
    own = own_place(0)
    peers = Peers(own, [own, Place(1, own.host, child.pid)])
    if number is not None:
        child.send_signal(number)
    # The peer stays unreaped, as it does for a moment under a launcher.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    cause = peers.explain(RuntimeError("Connection closed by peer"))
    child.wait()
    return cause


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_peer_that_a_signal_ended_is_named_with_it(number: int) -> None:
    cause = ended([SLEEP], number)
    assert isinstance(cause, RankLostError)
    assert "rank 1 (process" in str(cause)
    assert f"was ended by {signal.Signals(number).name}" in str(cause)
    assert "Connection closed by peer" in str(cause)


def test_a_peer_that_ended_by_itself_is_named_with_its_code() -> None:
    assert "ended with exit code 7" in str(ended(["import sys; sys.exit(7)"], None))


def test_an_error_that_says_its_own_cause_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.peers.NOTICE_SECONDS", 0.0)
    own = own_place(0)
    peers = Peers(own, [own])
    for error in (ValueError("x"), OSError("y"), CheckpointError("none", "z"), RuntimeError("w")):
        assert peers.explain(error) is error


def test_a_collective_that_timed_out_is_a_hang() -> None:
    own = own_place(0)
    cause = Peers(own, [own]).explain(RuntimeError("Timed out waiting 600000ms for recv"))
    assert isinstance(cause, HangError)
    assert cause.exit_code == ExitCode.HANG


@pytest.mark.distributed
def test_the_survivor_of_a_killed_rank_names_it_and_does_not_end_well(tmp_path: Path) -> None:
    root = build_tiny(tmp_path / "data")
    asked = make(root, ranks=2)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    job = TrainJob(sweep, (Unit(asked.folder_name, (asked,)),), None)
    ends = on_ranks(2, functools.partial(run_as_job, job), ["", "train.step:6"])
    assert ends == [ExitCode.FAILED, -signal.SIGKILL]
    failure = Journal(sweep).failures(0)[asked.folder_name]
    assert "rank 1 (process" in failure.reason
    assert read_json(sweep / asked.folder_name / "STATUS.json")["state"] == "failed"


def run_as_job(job: TrainJob) -> None:
    """Train as a submitted job does, without submitit's own environment."""
    job.run()
    if job.failed:
        sys.exit(int(next(iter(job.failed.values())).code))


@pytest.mark.slow
def test_the_launcher_says_which_rank_was_killed(tmp_path: Path) -> None:
    asked = at_budget(make(build_tiny(tmp_path / "data"), ranks=2), 512 * 4000)
    sections = {"execution": dump(asked.execution), "evaluation": dump(asked.evaluation)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**dump(asked.run), **sections}))
    words = ["launch/train.py", str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")]
    folder = tmp_path / "runs" / asked.folder_name
    running = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not (folder / "checkpoints" / "step-00000004").exists() and running.poll() is None:
        time.sleep(0.02)
    os.kill(read_json(folder / "OWNER.json")["pid"], signal.SIGKILL)
    out, _ = running.communicate()
    said = " ".join(out.decode().split())
    assert running.returncode == ExitCode.FAILED, said
    assert "not complete: rank 0 (process" in said
    # Where its parent asked first, the signal is gone with the process.
    assert "was ended by SIGKILL" in said or "has ended" in said
