"""A disk that takes no more bytes: what is lost is told, and nothing unsaved counts as done."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import trainer.append_file
import trainer.record
import trainer.session
from launch.job import TrainJob, Unit
from launch.journal import Journal
from launch.run_status import RunStatus, status_of
from launch.train import main
from sweeps.grammar import Experiment, trunks_of
from tests.trainer.study import at_budget, build_tiny, make, read_exact, run
from trainer.checkpoint import SaveError, SaveFailure, publish
from trainer.exit_codes import ExitCode
from trainer.manifest import CheckpointError
from trainer.record import read_json
from trainer.schedule import decay_begins
from trainer.schema import dump

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LAST = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("whole")
    run(make(root), folder / "run")
    return read_exact(folder / "run")


def fail_saves(monkeypatch: pytest.MonkeyPatch, failing: Callable[[int], bool]) -> None:
    """Let the saves of some steps find a full disk."""

    def save(folder: Path, draft, group, owner):
        if failing(draft.step):
            return SaveFailure(draft.step, 0, str(folder), errno.ENOSPC, "OSError", 10, 5)
        return publish(folder, draft, group, owner)

    monkeypatch.setattr(trainer.session, "publish", save)


def fail_writes(monkeypatch: pytest.MonkeyPatch, name: str, number: int = errno.ENOSPC) -> None:
    """Let every write of files of one name find the disk full, after a few bytes."""
    write, atomically = os.write, trainer.record.write_atomically

    def full(file: int, content: bytes) -> int:
        if Path(f"/proc/self/fd/{file}").readlink().name != name:
            return write(file, content)
        write(file, content[:5])
        raise OSError(number, os.strerror(number))

    def replaced(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        atomically(path, text)

    monkeypatch.setattr(trainer.append_file.os, "write", full)
    monkeypatch.setattr(trainer.record, "write_atomically", replaced)


def job_of(experiment: Experiment, sweep: Path) -> TrainJob:
    return TrainJob(sweep, (Unit(experiment.folder_name, (experiment,)),), None)


def test_a_failed_save_that_nothing_needs_is_a_warning(
    root: Path, tmp_path: Path, whole: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_saves(monkeypatch, lambda step: step < LAST)
    assert run(make(root), tmp_path / "run").state == "done"
    assert "disk full" in (tmp_path / "run" / "warnings.txt").read_text()
    assert read_exact(tmp_path / "run") == whole


def test_a_failed_last_save_is_not_done_and_is_made_good_by_the_same_command(
    root: Path, tmp_path: Path, whole: tuple, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import yaml

    asked = make(root)
    sections = {"execution": dump(asked.execution), "evaluation": dump(asked.evaluation)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**dump(asked.run), **sections}))
    words = [str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")]
    folder = tmp_path / "runs" / asked.folder_name
    with monkeypatch.context() as patched:
        fail_saves(patched, lambda step: step == LAST)
        assert main(words) == ExitCode.DISK
    said = " ".join(capsys.readouterr().out.split())
    assert "not complete: disk full: step 20" in said
    assert "rerun the same command" in said
    assert not (folder / "summary.json").exists()
    assert read_json(folder / "STATUS.json")["state"] == "failed"
    assert main(words) == ExitCode.DONE
    assert read_exact(folder) == whole
    assert (folder / "checkpoints" / "step-00000020").is_dir()


def test_a_failed_save_at_a_fork_fails_the_trunk_and_its_branches(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = make(root)
    branches = (short, at_budget(short, 12288))
    ((name, trunk),) = trunks_of(branches).items()
    assert trunk is not None
    unit = Unit(name, branches, trunk.experiment, trunk.forks)
    with monkeypatch.context() as patched:
        fail_saves(patched, lambda step: step == decay_begins(short.run))
        failing = TrainJob(tmp_path, (unit,), None)
        failing.run()
    assert {name: failing.failed[name].code for name in failing.failed} == {name: ExitCode.DISK}
    assert not list(tmp_path.glob("*/summary.json"))
    again = TrainJob(tmp_path, (unit,), None)
    again.run()
    assert again.failed == {}
    assert all(status_of(e, tmp_path / e.folder_name) is RunStatus.DONE for e in branches)


def test_a_run_whose_saves_all_failed_is_trained_anew_by_the_same_command(
    root: Path, tmp_path: Path, whole: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_saves(patched, lambda _: True)
        with pytest.raises(SaveError):
            run(make(root), tmp_path / "run")
    assert run(make(root), tmp_path / "run").state == "done"
    assert read_exact(tmp_path / "run") == whole


def test_a_run_whose_checkpoints_were_removed_is_not_trained_anew_in_silence(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_saves(patched, lambda step: step == LAST)
        with pytest.raises(SaveError):
            run(make(root), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has saved checkpoints, but none is there"):
        run(make(root), tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "evaluations.jsonl", "summary.json", "provenance.json", "config.yaml"]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_write_of_a_record_is_not_done_and_names_its_file(
    root: Path,
    tmp_path: Path,
    whole: tuple,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    asked = make(root)
    failing = job_of(asked, tmp_path)
    with monkeypatch.context() as patched:
        fail_writes(patched, name, number)
        failing.run()
    folder = tmp_path / asked.folder_name
    reason, code = failing.failed[folder.name]
    assert code == ExitCode.DISK
    assert str(folder / name) in reason
    assert "rerun the same command" in reason
    assert status_of(asked, folder) is not RunStatus.DONE
    assert read_json(folder / "STATUS.json")["state"] == "failed"
    assert (folder / "error.txt").read_text().startswith("Traceback")
    again = job_of(asked, tmp_path)
    again.run()
    assert again.failed == {}
    assert read_exact(folder) == whole


def test_a_failure_that_the_journal_cannot_take_is_known_to_the_launcher(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    asked = make(root)
    failing = job_of(asked, tmp_path)
    fail_saves(monkeypatch, lambda step: step == LAST)
    fail_writes(monkeypatch, "journal.jsonl")
    failing.run()
    assert failing.failed[asked.folder_name].code == ExitCode.DISK
    assert Journal(tmp_path).rows() == []
    assert "cannot be recorded" in capsys.readouterr().err


def test_a_status_that_no_new_file_fits_for_is_written_over(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    fail_saves(monkeypatch, lambda step: step == LAST)
    run_status = trainer.record.write_atomically

    def replaced(path: Path, text: str) -> None:
        if path.name == "STATUS.json" and "failed" in text:
            raise OSError(errno.ENOSPC, "full", str(path))
        run_status(path, text)

    monkeypatch.setattr(trainer.record, "write_atomically", replaced)
    with pytest.raises(SaveError):
        run(make(root), folder)
    assert read_json(folder / "STATUS.json")["state"] == "failed"


def test_an_evaluation_that_failed_is_not_done_and_is_measured_again(
    root: Path, tmp_path: Path, whole: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make(root)
    folder = tmp_path / asked.folder_name

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("trainer.evaluate.Evaluator._measure", broken)
        job_of(asked, tmp_path).run()
    assert status_of(asked, folder) is RunStatus.UNEVALUATED
    job_of(asked, tmp_path).run()
    assert status_of(asked, folder) is RunStatus.DONE
