"""Checkpoints: what is committed is found again unless it was touched, and nothing else is."""

import errno
import multiprocessing
import os
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from torch import distributed as dist

from tests.trainer.checkpoint_samples import (
    FILES,
    SOLO,
    draft,
    flip_bit,
    save,
    tree,
    truncate,
    verify,
    write_files,
)
from trainer.checkpoint import SaveFailure, SupersededError, collect, newest, publish, require_room
from trainer.exit_codes import ExitCode
from trainer.manifest import MANIFEST, CheckpointError
from trainer.parallel import DistributedGroup
from trainer.record import RunRecord, write_json


@pytest.fixture
def record(tmp_path):
    with closing(RunRecord(tmp_path / "run")) as opened:
        yield opened


@pytest.fixture
def two(record):
    """The folder of a run with checkpoints at steps 10 and 20."""
    save(record, 10, 20)
    return record.checkpoints


def test_what_was_saved_last_is_found_with_its_facts(record):
    save(record, 10)
    path = publish(
        record.checkpoints, draft(20, facts={"tokens": 7, "world": {"ranks": 2}}), SOLO, record
    )
    found = newest(record.checkpoints, SOLO, None)
    assert found is not None
    assert found.path == path
    assert found.manifest["tokens"] == 7
    assert found.manifest["world"] == {"ranks": 2}
    assert set(found.manifest["files"]) == set(FILES)


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest(tmp_path / "checkpoints", SOLO, None) is newest(tmp_path, SOLO, None) is None


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_said(two):
    os.utime(two / "step-00000010", (2**31, 2**31))
    os.utime(two / "step-00000010" / MANIFEST, (2**31, 2**31))
    found = newest(two, SOLO, None)
    assert found is not None
    assert found.manifest["step"] == 20


def test_steps_are_compared_as_numbers(record):
    save(record, 99_999_999, 100_000_000)
    found = newest(record.checkpoints, SOLO, None)
    assert found is not None
    assert found.manifest["step"] == 100_000_000


def test_a_checkpoint_that_is_not_wanted_is_passed_over_and_stays(two):
    found = newest(two, SOLO, lambda manifest: manifest["tokens"] <= 5120)
    assert found is not None
    assert found.manifest["step"] == 10
    assert found.rejected == ()
    assert (two / "step-00000020").is_dir()


def test_no_wanted_checkpoint_is_not_an_error(two):
    assert newest(two, SOLO, lambda _manifest: False) is None


def test_when_none_is_whole_the_run_stops_and_nothing_is_changed(two):
    flip_bit(two / "step-00000020" / FILES[1])
    (two / "step-00000010" / MANIFEST).unlink()
    before = tree(two)
    with pytest.raises(CheckpointError, match="none is whole") as caught:
        newest(two, SOLO, None)
    assert caught.value.exit_code is ExitCode.BAD_CHECKPOINT
    assert FILES[1] in str(caught.value)
    assert "step-00000010/MANIFEST.json" in str(caught.value)
    assert tree(two) == before


def test_checkpoints_that_were_all_put_aside_still_forbid_to_start_anew(two):
    flip_bit(two / "step-00000020" / FILES[1])
    newest(two, SOLO, None)
    (two / "step-00000010").rename(two / "step-00000010.bad-hash")
    with pytest.raises(CheckpointError, match="none is whole"):
        newest(two, SOLO, None)


def test_a_second_damaged_checkpoint_of_a_step_is_put_beside_the_first(record):
    for _ in range(2):
        save(record, *([10] if not (record.checkpoints / "step-00000010").exists() else []), 20)
        flip_bit(record.checkpoints / "step-00000020" / FILES[0])
        newest(record.checkpoints, SOLO, None)
    names = sorted(path.name for path in record.checkpoints.glob("*.bad-*"))
    assert names == ["step-00000020.bad-hash", "step-00000020.bad-hash-1"]


def test_a_write_that_fails_leaves_everything_as_it_was(two, record):
    before = tree(two)

    def fail(tmp, step):
        write_files(tmp, step)
        raise OSError(errno.EIO, "Input/output error", str(tmp / FILES[1]))

    failure = publish(two, draft(30, write=fail), SOLO, record)

    assert isinstance(failure, SaveFailure)
    assert (failure.step, failure.rank, failure.errno) == (30, 0, errno.EIO)
    assert failure.path.endswith(FILES[1])
    assert tree(two) == before


def test_a_full_disk_is_recognised_behind_the_error_of_a_library(two, record):
    def fail(tmp, _step):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp / "x"))
        except OSError as error:
            raise RuntimeError("unexpected pos 2816 vs 2710") from error

    failure = publish(two, draft(30, write=fail), SOLO, record)
    assert isinstance(failure, SaveFailure)
    assert failure.errno == errno.ENOSPC
    assert str(failure).startswith("disk full: step 30, rank 0, ")


def test_a_mistake_in_the_code_that_writes_is_not_taken_for_a_failed_save(two, record):
    def fail(_tmp, _step):
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        publish(two, draft(30, write=fail), SOLO, record)


def test_a_link_among_the_files_fails_the_save(two, record):
    def link(tmp, _step):
        (tmp / "x.json").symlink_to("/etc/hostname")

    failure = publish(two, draft(30, write=link), SOLO, record)
    assert isinstance(failure, SaveFailure)
    assert "x.json" in failure.cause


def test_a_step_is_never_committed_twice(two, record):
    before = tree(two)
    failure = publish(two, draft(20), SOLO, record)
    assert isinstance(failure, SaveFailure)
    assert failure.errno == errno.EEXIST
    assert tree(two) == before


def test_a_path_that_is_a_file_fails_the_save_with_its_name(record):
    record.checkpoints.write_text("in the way")
    failure = publish(record.checkpoints, draft(10), SOLO, record)
    assert isinstance(failure, SaveFailure)
    assert failure.path == str(record.checkpoints)


def test_a_damaged_checkpoint_does_not_hinder_the_next_save(two, record):
    (two / "step-00000020" / MANIFEST).unlink()
    save(record, 30)
    assert collect(two, 2, SOLO, record) is None
    assert verify(two / "step-00000030")["step"] == 30


def take_over(record):
    """What the start of another process on another machine writes."""
    owner = {"incarnation": record.incarnation + 1, "pid": os.getpid()}
    write_json(record.path / "OWNER.json", owner)


def test_a_stale_incarnation_writes_nothing(two, record):
    before, writes = tree(two), []
    take_over(record)
    with pytest.raises(SupersededError, match="incarnation 1"):
        publish(two, draft(30, write=lambda tmp, _step: writes.append(tmp)), SOLO, record)
    assert writes == []
    assert tree(two) == before


def test_an_incarnation_that_is_superseded_while_it_writes_commits_nothing(two, record):
    before = tree(two)

    def write(tmp, step):
        write_files(tmp, step)
        take_over(record)

    with pytest.raises(SupersededError):
        publish(two, draft(30, write=write), SOLO, record)
    assert tree(two) == before


def test_a_stale_incarnation_removes_nothing(record):
    save(record, 10, 20, 30)
    before = tree(record.checkpoints)
    take_over(record)
    assert collect(record.checkpoints, 2, SOLO, record) is None
    assert tree(record.checkpoints) == before


def steps_in(folder):
    return [int(path.name[5:]) for path in sorted(folder.glob("step-????????"))]


def test_the_newest_ones_and_the_pinned_ones_are_kept(record):
    save(record, 10, 20, 30, 40, 50, pinned=(10, 30))
    assert collect(record.checkpoints, 2, SOLO, record) is None
    assert steps_in(record.checkpoints) == [10, 30, 40, 50]


def test_a_damaged_checkpoint_does_not_count_as_kept(record):
    save(record, 10, 20, 30, 40)
    truncate(record.checkpoints / "step-00000040" / FILES[0])
    collect(record.checkpoints, 2, SOLO, record)
    assert steps_in(record.checkpoints) == [20, 30, 40]


def test_the_leftovers_of_a_later_incarnation_are_not_swept(two, record):
    for incarnation in (1, 2):
        (two / f"step-00000030.tmp-{incarnation}").mkdir()
    collect(two, 2, SOLO, record)
    assert [path.name for path in two.glob("*.tmp-*")] == ["step-00000030.tmp-2"]


def test_what_was_put_aside_as_damaged_is_never_removed(two, record):
    flip_bit(two / "step-00000020" / FILES[0])
    newest(two, SOLO, None)
    save(record, 30, 40, 50)
    collect(two, 2, SOLO, record)
    assert (two / "step-00000020.bad-hash").is_dir()


def test_room_is_refused_in_bytes_and_in_files(tmp_path):
    require_room(tmp_path, 1, 1)
    with pytest.raises(OSError, match="bytes free"):
        require_room(tmp_path, 2**62, 1)
    if os.statvfs(tmp_path).f_files:
        with pytest.raises(OSError, match="inodes free"):
            require_room(tmp_path, 1, 2**62)


def test_facts_may_not_shadow_the_manifest_or_hide_what_json_cannot_hold():
    with pytest.raises(AssertionError, match="files"):
        draft(1, facts={"files": {}})
    with pytest.raises(ValueError, match="JSON"):
        draft(1, facts={"loss": float("nan")})


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(
    record, monkeypatch
):
    seen, fsync, rename = [], os.fsync, os.rename

    def note_sync(descriptor):
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_rename(source, target):
        seen.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    save(record, 10)
    at = seen.index("rename")
    files = {Path(name).name for name in FILES}
    folders = {"step-00000010.tmp-1", "deepspeed", "state"}
    assert set(seen[:at]) == files | folders | {MANIFEST}
    assert seen.index(MANIFEST) < seen.index("step-00000010.tmp-1")
    assert seen[at + 1 :] == ["checkpoints"]


@pytest.mark.benchmark
def test_a_save_of_one_megabyte_is_timed(record, capsys):
    content = os.urandom(333_000)

    def write(tmp, step):
        for name in FILES:
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(content)

    milliseconds = []
    for step in range(1, 21):
        begun = time.perf_counter()
        publish(record.checkpoints, draft(step, write=write), SOLO, record)
        collect(record.checkpoints, 2, SOLO, record)
        milliseconds.append(1000 * (time.perf_counter() - begun))
    middle, last = sorted(milliseconds)[10], max(milliseconds)
    with capsys.disabled():
        sys.stdout.write(f"\nsave of 1 MB: median {middle:.1f} ms, slowest of 20 {last:.1f} ms\n")


def save_on_two_ranks(rank, folder, answers):
    """Three saves: rank 1 fails in the first, none in the second, the third is superseded."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    group = DistributedGroup(dist.new_group(backend="gloo"))
    said = []
    with closing(RunRecord(folder / ("run" if rank == 0 else "other"))) as opened:
        checkpoints, owner = folder / "run" / "checkpoints", opened if rank == 0 else None

        def write(tmp, step):
            (tmp / f"rank_{rank}.json").write_text(f"{rank} {step}")
            if step == 10 and rank == 1:
                raise OSError(errno.EDQUOT, "Disk quota exceeded", str(tmp / "rank_1.json"))

        for step in (10, 20):
            said.append(publish(checkpoints, draft(step, write=write), group, owner))
            dist.barrier()
            said.append(sorted(path.name for path in checkpoints.iterdir()))
            dist.barrier()
        said.append(newest(checkpoints, group, None))
        if owner is not None:
            take_over(owner)
        try:
            publish(checkpoints, draft(30, write=write), group, owner)
        except SupersededError as error:
            said.append(str(error))
    answers.put((rank, said))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two ranks heard in `save_on_two_ranks`, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    ranks = [
        spawn.Process(target=save_on_two_ranks, args=(rank, folder, answers)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    said = dict(answers.get(timeout=50) for _ in ranks)
    for rank in ranks:
        rank.join(10)
        rank.kill()
    return said, folder / "run" / "checkpoints"


@pytest.mark.distributed
def test_a_write_that_fails_on_one_rank_fails_the_save_on_all_of_them(two_ranks):
    said, _ = two_ranks
    failure, left = said[0][:2]
    assert isinstance(failure, SaveFailure)
    assert (failure.step, failure.rank, failure.errno) == (10, 1, errno.EDQUOT)
    assert left == []
    assert said[1][:2] == said[0][:2]


@pytest.mark.distributed
def test_the_save_after_it_commits_the_files_of_every_rank(two_ranks):
    said, folder = two_ranks
    assert said[0][2] == said[1][2] == folder / "step-00000020"
    assert set(verify(folder / "step-00000020")["files"]) == {"rank_0.json", "rank_1.json"}


@pytest.mark.distributed
def test_all_ranks_resume_from_the_same_checkpoint(two_ranks):
    said, folder = two_ranks
    assert said[0][4] == said[1][4]
    assert said[0][4].path == folder / "step-00000020"


@pytest.mark.distributed
def test_all_ranks_of_a_superseded_incarnation_end(two_ranks):
    said, folder = two_ranks
    assert said[0][5] == said[1][5]
    assert "superseded" in said[1][5]
    assert [path.name for path in folder.iterdir()] == ["step-00000020"]
