"""SIGKILL anywhere, then the same command: the end is bit-identical to an undisturbed one."""

import pickle
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.job import TrainJob, Unit
from sweeps.grammar import trunks_of
from tests.faults.incarnations import Incarnations
from tests.trainer.study import MAMBA, at_budget, build_tiny, make, read_exact
from trainer.checkpoint import FAULT_POINTS
from trainer.record import read_run
from trainer.schedule import decay_begins

KILLED = -signal.SIGKILL
STEPS = tuple(sorted(random.Random(11).sample(range(8, 22), 3)))
"""Three moments in the trunk (18 steps, saved every 4) and the branch that follows it."""


@pytest.fixture(scope="module")
def server() -> Iterator[Incarnations]:
    with Incarnations() as running:
        yield running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def job_file(root: Path, folder: Path) -> tuple[str, Unit]:
    """A trunk of two horizons, as a worker gets it."""
    short = make(root, MAMBA)
    branches = (short, at_budget(short, 12288))
    ((name, trunk),) = trunks_of(branches).items()
    assert trunk is not None
    unit = Unit(name, branches, trunk.experiment, trunk.forks)
    file = folder / "job.pkl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(TrainJob(folder, (unit,), None)))
    return str(file), unit


@pytest.fixture(scope="module")
def undisturbed(
    root: Path, server: Incarnations, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job, unit = job_file(root, folder)
    assert server.start(job) == 0
    return all_exact(folder, unit)


def all_exact(folder: Path, unit: Unit) -> dict[str, tuple]:
    names = [unit.name, *(branch.folder_name for branch in unit.branches)]
    return {name: read_exact(folder / name) for name in names}


def redone(folder: Path) -> int:
    """Steps that more than one incarnation has trained."""
    from trainer.record import read_rows

    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    return len(steps) - len(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_a_random_step_leaves_no_trace(
    root: Path, server: Incarnations, undisturbed: dict, tmp_path: Path, step: int
) -> None:
    job, unit = job_file(root, tmp_path)
    assert server.start(job, f"train.step:{step}") == KILLED
    assert server.start(job) == 0
    assert all_exact(tmp_path, unit) == undisturbed


@pytest.mark.slow
def test_a_kill_inside_a_decay_branch_redoes_its_steps(
    root: Path, server: Incarnations, undisturbed: dict, tmp_path: Path
) -> None:
    job, unit = job_file(root, tmp_path)
    trunk_steps = max(unit.forks)
    short = unit.branches[0]
    in_branch = short.run.steps - decay_begins(short.run) - 1
    assert in_branch >= 3
    assert server.start(job, f"train.step:{trunk_steps + in_branch}") == KILLED
    interrupted = read_run(tmp_path / short.folder_name)
    assert interrupted.metrics[-1]["step"] == short.run.steps - 1
    assert server.start(job) == 0
    assert redone(tmp_path / short.folder_name) >= 3
    assert all_exact(tmp_path, unit) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_every_point_of_a_save_leaves_no_trace(
    root: Path, server: Incarnations, undisturbed: dict, tmp_path: Path, point: str
) -> None:
    job, unit = job_file(root, tmp_path)
    # The third passing: two committed checkpoints stand, and there is something to collect.
    assert server.start(job, f"{point}:3") == KILLED
    assert server.start(job) == 0
    assert all_exact(tmp_path, unit) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("passing", [1, 2, 3, 4, 5, 6])
def test_a_kill_between_two_sets_of_an_evaluation_leaves_none_out(
    root: Path, server: Incarnations, undisturbed: dict, tmp_path: Path, passing: int
) -> None:
    job, unit = job_file(root, tmp_path)
    assert server.start(job, f"evaluate.set_done:{passing}") == KILLED
    assert server.start(job) == 0
    assert all_exact(tmp_path, unit) == undisturbed


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_save_loses_nothing(
    root: Path, server: Incarnations, undisturbed: dict, tmp_path: Path
) -> None:
    job, unit = job_file(root, tmp_path)
    assert server.start(job, "save.files_written:2:enospc") == 0
    assert "disk full" in (tmp_path / unit.name / "warnings.txt").read_text()
    assert all_exact(tmp_path, unit) == undisturbed
