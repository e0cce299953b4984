"""A process that is killed, or whose disk is full, at every point of a save and a collection."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from tests.faults.checkpoint_victim import FILES, content
from tests.trainer.checkpoint_samples import verify
from trainer import checkpoint
from trainer.checkpoint import FAULT_POINTS
from trainer.manifest import MANIFEST, CheckpointError, committed, inspect
from trainer.parallel import SoloGroup
from trainer.record import RunRecord

SIZE = 512 * 1024
SAVE_POINTS = [point for point in FAULT_POINTS if point.startswith("save.")]
POINTS = [*FAULT_POINTS, "test.mid_write"]
COMMITTED_AT = {
    *("save.renamed", "save.parent_synced"),
    *(point for point in FAULT_POINTS if point.startswith("collect.")),
}


def write_nothing(_folder):
    pass


class Victim:
    """The forking process; see its file."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.checkpoint_victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._answers = self._process.stdin, self._process.stdout

    def save(self, run, steps, fault="", size=SIZE, pinned=()):
        task = {"run": str(run), "steps": steps, "fault": fault, "size": size, "pinned": pinned}
        self._tasks.write(json.dumps(task) + "\n")
        self._tasks.flush()
        return json.loads(self._answers.readline())

    def end(self):
        self._tasks.close()
        self._process.wait(10)
        self._answers.close()


@pytest.fixture(scope="module")
def victim():
    victim = Victim()
    yield victim
    victim.end()


def steps_that_verify(folder):
    steps = []
    for path in committed(folder):
        try:
            steps.append(verify(path)["step"])
        except CheckpointError:
            continue
    return steps


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_the_newest_commit_to_resume_from(tmp_path, victim, point):
    folder = tmp_path / "checkpoints"
    assert victim.save(tmp_path, [10, 20])["status"] == 0

    killed = victim.save(tmp_path, [30], fault=point)

    assert killed["status"] == -signal.SIGKILL
    found = inspect(folder, None)
    assert found is not None
    assert found.rejected == ()
    step = 30 if point in COMMITTED_AT else 20
    assert found.manifest["step"] == step
    stored = (found.path / "model.safetensors").read_bytes()
    assert stored == content(step, "model.safetensors", SIZE)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_at_least_two_whole_checkpoints(tmp_path, victim, point):
    victim.save(tmp_path, [10, 20])
    assert victim.save(tmp_path, [30], fault=point)["status"] == -signal.SIGKILL
    assert len(steps_that_verify(tmp_path / "checkpoints")) >= 2


@pytest.mark.parametrize("point", POINTS)
def test_the_next_commit_after_a_kill_sweeps_what_it_left(tmp_path, victim, point):
    victim.save(tmp_path, [10, 20])
    assert victim.save(tmp_path, [30], fault=point)["status"] == -signal.SIGKILL
    assert victim.save(tmp_path, [40])["status"] == 0
    left = ["step-00000030" if point in COMMITTED_AT else "step-00000020", "step-00000040"]
    assert names(tmp_path / "checkpoints") == left


def test_a_kill_in_the_very_first_save_leaves_nothing_to_resume_from(tmp_path, victim):
    assert victim.save(tmp_path, [10], fault="save.before_rename")["status"] == -signal.SIGKILL
    assert inspect(tmp_path / "checkpoints", None) is None


def test_manifests_are_chained_across_a_kill(tmp_path, victim):
    victim.save(tmp_path, [10, 20])
    victim.save(tmp_path, [30], fault="save.hashed")
    victim.save(tmp_path, [40])
    newer, older = (verify(path) for path in committed(tmp_path / "checkpoints"))
    text = (tmp_path / "checkpoints" / "step-00000020" / MANIFEST).read_bytes()
    assert older["step"] == 20
    assert newer["previous"] == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("point", [*SAVE_POINTS, "test.mid_write"])
def test_a_full_disk_is_reported_and_the_save_after_it_commits(tmp_path, victim, point):
    folder = tmp_path / "checkpoints"
    victim.save(tmp_path, [10, 20])

    answer = victim.save(tmp_path, [30, 40], fault=f"{point}:1:enospc")

    assert answer["status"] == 0
    failure, saved = answer["said"]
    assert failure.startswith(f"disk full: step 30, rank 0, {point}: OSError")
    assert saved == str(folder / "step-00000040")
    assert steps_that_verify(folder) == [40, 30 if point in COMMITTED_AT else 20]
    assert len(names(folder)) == 2


@pytest.mark.parametrize("point", [each for each in FAULT_POINTS if each.startswith("collect.")])
def test_a_disk_error_in_a_collection_does_not_end_the_run(tmp_path, victim, point):
    victim.save(tmp_path, [10, 20])
    answer = victim.save(tmp_path, [30, 40], fault=f"{point}:1:enospc")
    assert answer["status"] == 0
    assert steps_that_verify(tmp_path / "checkpoints") == [40, 30]
    assert len(names(tmp_path / "checkpoints")) == 2


def test_every_fault_point_is_passed_in_the_order_it_is_listed(tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr(checkpoint, "fault_point", passed.append)
    with closing(RunRecord(tmp_path)) as record:
        for step in (1, 2, 3):
            passed.clear()
            draft = checkpoint.Draft(step, {}, False, write_nothing)
            checkpoint.publish(record.checkpoints, draft, SoloGroup(), record)
            checkpoint.collect(record.checkpoints, 2, SoloGroup(), record)
    assert tuple(passed) == FAULT_POINTS


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs to be root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_disk_that_is_really_full_keeps_the_old_checkpoint_and_recovers(small_disk, victim):
    folder = small_disk / "checkpoints"
    assert victim.save(small_disk, [10], size=64 * 1024)["status"] == 0

    full = victim.save(small_disk, [20], size=1024 * 1024)

    assert full["status"] == 0
    assert full["said"][0].startswith("disk full: step 20, rank 0, ")
    assert names(folder) == ["step-00000010"]
    assert steps_that_verify(folder) == [10]
    assert victim.save(small_disk, [30], size=64 * 1024)["said"] == [str(folder / "step-00000030")]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_save_that_cannot_fit_is_refused_before_it_is_begun(small_disk, victim):
    victim.save(small_disk, [10], size=256 * 1024)
    (small_disk / "ballast").write_bytes(bytes(1536 * 1024))
    (failure,) = victim.save(small_disk, [20], fault="save.tmp_made", size=256 * 1024)["said"]
    assert failure.startswith("disk full: step 20, rank 0, ")
    assert "needed" in failure


def test_content_differs_by_step_and_by_file():
    texts = {content(step, name, 64) for step in (10, 20) for name in FILES}
    assert len(texts) == 2 * len(FILES)
