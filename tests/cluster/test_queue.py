"""Jobs of an earlier launcher, and their state, against a squeue that answers as it is told."""

import os

import pytest

from launch import cluster
from launch.journal import Journal
from launch.slurm import QueuedJob, QueueWatcher, held_jobs


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Sets what squeue answers; it fails until it was told."""
    answer = tmp_path / "answer"
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec cat "{answer}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(QueuedJob, "watcher", QueueWatcher(delay_s=30))
    return answer.write_text


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    (folder / "jobs").mkdir(parents=True)
    return folder


def adopted(sweep):
    return {unit: s.job.job_id for unit, s in cluster._still_queued(sweep).items()}


def test_a_job_lasts_while_the_controller_holds_it(tmp_path, squeue):
    job = QueuedJob(folder=tmp_path, job_id="7")
    squeue("7|intent\n")
    assert not job.done(force_check=True)
    squeue("8|intent\n")
    QueuedJob.watcher.update()
    assert job.done()


def test_a_silent_controller_ends_no_job(tmp_path, squeue):
    assert not QueuedJob(folder=tmp_path, job_id="7").done(force_check=True)


def test_nothing_can_be_adopted_from_a_silent_controller(squeue):
    with pytest.raises(RuntimeError, match="nothing was submitted"):
        held_jobs()


def test_a_job_is_adopted_when_its_launcher_was_killed_before_the_row_about_it(sweep, squeue):
    Journal(sweep).write("intent", units="a,b", intent="0f", ranks=1)
    squeue("7|0f\n")
    assert adopted(sweep) == {"a": "7", "b": "7"}


def test_a_job_is_adopted_by_its_id_where_the_site_changes_comments(sweep, squeue):
    Journal(sweep).write("intent", units="a", intent="0f", ranks=2)
    Journal(sweep).write("submitted", units="a", intent="0f", ranks=2, job="7")
    squeue("7|charged to physics\n")
    assert adopted(sweep) == {"a": "7"}


def test_jobs_that_have_ended_or_are_of_another_sweep_are_not_adopted(sweep, squeue):
    Journal(sweep).write("intent", units="a", intent="0f", ranks=1)
    Journal(sweep).write("submitted", units="a", intent="0f", ranks=1, job="7")
    squeue("8|1e\n9|(null)\n")
    assert adopted(sweep) == {}


def test_a_process_id_of_a_local_job_is_no_job_id(sweep, squeue):
    Journal(sweep).write("intent", units="a", intent=None, ranks=1)
    Journal(sweep).write("submitted", units="a", intent=None, ranks=1, job="7")
    squeue("7|0f\n")
    assert adopted(sweep) == {}


def test_an_adopted_job_of_two_ranks_lasts_until_both_have_a_result(sweep, squeue):
    Journal(sweep).write("intent", units="a", intent="0f", ranks=2)
    squeue("7|0f\n")
    job = cluster._still_queued(sweep)["a"].job
    for rank in range(2):
        assert not job.done()
        (sweep / "jobs" / f"7_{rank}_result.pkl").write_bytes(b"")
    assert job.done()
