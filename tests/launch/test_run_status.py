"""One damaged run of a sweep: it is named, and the others are neither stopped nor trained again."""

import shutil
from pathlib import Path

import pytest
import yaml

from launch.job import TrainJob, Unit
from launch.journal import Journal
from launch.plan import _measured_rate
from launch.run_status import RunStatus, survey
from launch.train import main
from tests.trainer.study import build_tiny, make, run
from trainer.exit_codes import ExitCode
from trainer.record import read_status
from trainer.schema import dump

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FILES = ("config.yaml", "provenance.json", "summary.json", "metrics.jsonl", "evaluations.jsonl")
TEXTS = ("{", "[1]\n", "\0\n", "[" * 50_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two finished runs."""
    folder = tmp_path_factory.mktemp("trained")
    for experiment in two(root):
        run(experiment, folder / experiment.folder_name)
    return folder


def two(root: Path) -> list:
    return [make(root), make(root, {"seed": 18})]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_finished_run_is_named_and_left_alone(
    root: Path, trained: Path, tmp_path: Path, file: str, text: str
) -> None:
    sweep = shutil.copytree(trained, tmp_path / "sweep")
    first, second = two(root)
    (sweep / first.folder_name / file).write_text(text)
    statuses, damage = survey((first, second), sweep)
    assert statuses == {
        first.folder_name: RunStatus.DAMAGED,
        second.folder_name: RunStatus.DONE,
    }
    assert str(sweep / first.folder_name / file) in damage[first.folder_name]
    job = TrainJob(sweep, tuple(Unit(e.folder_name, (e,)) for e in (first, second)), None)
    job.run()
    assert Journal(sweep).rows() == []


@pytest.mark.parametrize("text", [*TEXTS, '{"step": null, "loss_nats": "x", "state": "running"}'])
def test_a_damaged_status_is_no_status(
    root: Path, trained: Path, tmp_path: Path, text: str
) -> None:
    sweep = shutil.copytree(trained, tmp_path / "sweep")
    first, _ = two(root)
    (sweep / first.folder_name / "STATUS.json").write_text(text)
    statuses, _ = survey([first], sweep)
    assert statuses[first.folder_name] is RunStatus.DONE
    assert set(read_status(sweep / first.folder_name)) <= {"state"}


def test_an_estimate_does_without_a_damaged_record(trained: Path, tmp_path: Path) -> None:
    sweep = shutil.copytree(trained, tmp_path / "sweep")
    folder = next(path for path in sweep.iterdir() if (path / "metrics.jsonl").exists())
    assert _measured_rate(folder) is not None
    (folder / "metrics.jsonl").write_text("{\n")
    assert _measured_rate(folder) is None


def test_the_command_of_a_damaged_run_names_it_and_the_remedy(
    root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = shutil.copytree(trained, tmp_path / "sweep")
    first, _ = two(root)
    words = command_of(first, tmp_path, sweep)
    file = sweep / first.folder_name / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    assert main(words) == ExitCode.BAD_DATA
    said = " ".join(capsys.readouterr().out.split())
    assert f"error: rows of {file} are missing or changed" in said
    assert "move it away and rerun the same command" in said


def test_a_diverged_run_says_so_and_ends_with_its_own_code(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = make(root, {"optimizer": {"learning_rate": 1e36}})
    words = command_of(wild, tmp_path, tmp_path / "runs")
    for _ in range(2):
        assert main(words) == ExitCode.NUMERIC_HALT
        assert "diverged: non-finite for" in " ".join(capsys.readouterr().out.split())


def test_a_run_whose_checkpoints_are_all_damaged_ends_with_its_own_code(
    root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = shutil.copytree(trained, tmp_path / "sweep")
    first, _ = two(root)
    (sweep / first.folder_name / "summary.json").unlink()
    for file in (sweep / first.folder_name).glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"x")
    assert main(command_of(first, tmp_path, sweep)) == ExitCode.BAD_CHECKPOINT
    assert "none is whole" in " ".join(capsys.readouterr().out.split())


def command_of(experiment, folder: Path, runs: Path) -> list[str]:
    """The words of launch/train.py for an experiment."""
    sections = {"execution": dump(experiment.execution), "evaluation": dump(experiment.evaluation)}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**dump(experiment.run), **sections}))
    return [str(file), "--runs", str(runs)]
