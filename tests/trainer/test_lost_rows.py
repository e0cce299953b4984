"""Rows that were lost or changed: made anew where a checkpoint allows it, else refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.run_status import status_of
from launch.trained_run import load_run
from tests.trainer.study import build_tiny, make, read_exact, run, trunk_of
from trainer.manifest import CheckpointError
from trainer.record import read_json, write_json
from trainer.record_checks import DamagedRecordError, read_whole_run
from trainer.session import Lineage

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(make(root), folder).state == "done"
    return folder


@pytest.fixture(scope="module")
def killed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 14: saved at 8 and 12, evaluated at 10."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    passed = iter(range(1, 15))

    def end_at_14(_: str) -> None:
        if next(passed) == 14:
            raise RuntimeError("ended")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainer.train.fault_point", end_at_14)
        with pytest.raises(RuntimeError, match="ended"):
            run(make(root), folder)
    assert (folder / "checkpoints" / "step-00000012").is_dir()
    return folder


def cut(lines: int) -> Callable[[Path], None]:
    """Keep that many lines and a half."""

    def damage(file: Path) -> None:
        text = file.read_text().splitlines(keepends=True)
        file.write_text("".join(text[:lines]) + (text[lines][:20] if lines < len(text) else ""))

    return damage


def drop(line: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        text = file.read_text().splitlines(keepends=True)
        file.write_text("".join(text[:line] + text[line + 1 :]))

    return damage


def change(column: str, value: object) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        first, *others = file.read_text().splitlines(keepends=True)
        file.write_text(json.dumps({**json.loads(first), column: value}) + "\n" + "".join(others))

    return damage


DAMAGES = {
    "cut": ("metrics.jsonl", cut(7)),
    "emptied": ("metrics.jsonl", cut(0)),
    "a row dropped": ("metrics.jsonl", drop(3)),
    "a loss edited": ("metrics.jsonl", change("loss_nats", 1.0)),
    "gone": ("metrics.jsonl", Path.unlink),
    "evaluations emptied": ("evaluations.jsonl", cut(0)),
    "evaluations gone": ("evaluations.jsonl", Path.unlink),
    "an evaluation edited": ("evaluations.jsonl", change("total_nats", 1.0)),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_finished_run_that_lost_rows_is_refused_by_name(
    root: Path, finished: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / name)
    for opening in (
        lambda: read_whole_run(folder),
        lambda: status_of(make(root), folder),
        lambda: load_run(folder),
        lambda: run(make(root), folder),
    ):
        with pytest.raises(DamagedRecordError, match=rf"{name} are missing or changed.*rerun"):
            opening()
    assert read_json(folder / "summary.json") == read_json(finished / "summary.json")


REMADE = [
    (name, damage)
    for name, damage in (
        ("metrics.jsonl", cut(11)),
        ("metrics.jsonl", cut(9)),
        ("metrics.jsonl", cut(8)),
        ("metrics.jsonl", drop(9)),
        ("evaluations.jsonl", cut(0)),
        ("evaluations.jsonl", cut(1)),
        ("evaluations.jsonl", Path.unlink),
    )
]


@pytest.mark.parametrize(("name", "damage"), REMADE)
def test_rows_lost_since_an_earlier_checkpoint_are_made_anew(
    root: Path,
    finished: Path,
    killed: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    damage(folder / name)
    assert run(make(root), folder).state == "done"
    assert read_exact(folder) == read_exact(finished)
    assert (folder / "checkpoints" / "step-00000012.bad-rows").is_dir()
    assert name in (folder / "warnings.txt").read_text()


@pytest.mark.parametrize("damage", [cut(7), cut(0), drop(2), change("loss_nats", 1.0), Path.unlink])
def test_rows_that_no_checkpoint_can_make_anew_are_refused(
    root: Path, killed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(killed, tmp_path / "run")
    damage(folder / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl are missing or changed"):
        run(make(root), folder)
    assert (folder / "checkpoints" / "step-00000012").is_dir()


def test_a_branch_refuses_a_trunk_that_lost_rows(root: Path, tmp_path: Path) -> None:
    trunk = tmp_path / "trunk"
    run(trunk_of(make(root), 15), trunk, Lineage(forks=frozenset({15})))
    drop(2)(trunk / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"trunk/metrics\.jsonl are missing or changed"):
        run(make(root), tmp_path / "branch", Lineage(trunk=trunk))


CONTRADICTIONS = {
    "tokens": ("summary.json", "tokens", 1, "tokens is 1"),
    "step": ("summary.json", "step", 19, "is 20 in one place and 19"),
    "certificate": ("summary.json", "certificate", "0" * 16, "certificate is"),
    "bits": ("evaluations.jsonl", "bits_per_byte", 1.0, "bits_per_byte of .* is 1.0, but"),
    "nats": ("evaluations.jsonl", "total_nats", 9.0, "bits_per_byte of"),
    "evaluated tokens": ("evaluations.jsonl", "tokens", 3, "tokens of .* is 3"),
    "evaluated samples": ("evaluations.jsonl", "certificate", "0" * 16, "certificate at step"),
    "a step": ("metrics.jsonl", "step", 700, "step is 700"),
    "its tokens": ("metrics.jsonl", "tokens", 3, "tokens at step 1 is 3"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_quantities_that_contradict_each_other_are_refused_under_a_right_seal(
    finished: Path, tmp_path: Path, case: tuple
) -> None:
    name, column, value, message = case
    folder = shutil.copytree(finished, tmp_path / "run")
    summary = read_json(folder / "summary.json")
    if name == "summary.json":
        summary[column] = value
    else:
        change(column, value)(folder / name)
        summary["rows"][name] = sealed(folder / name)
    write_json(folder / "summary.json", summary)
    with pytest.raises(DamagedRecordError, match=message):
        read_whole_run(folder)


def sealed(file: Path) -> dict:
    import hashlib

    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_rows_of_a_later_evaluation_leave_the_seal_whole(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    folder = shutil.copytree(finished, tmp_path / "run")
    before = read_json(folder / "summary.json")["rows"]
    asked = make(root)
    more = replace(asked, evaluation=replace(asked.evaluation, blocks_per_set=2))
    assert run(more, folder).state == "done"
    after = read_json(folder / "summary.json")["rows"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert after["evaluations.jsonl"]["bytes"] > before["evaluations.jsonl"]["bytes"]
    assert read_whole_run(folder).summary["state"] == "done"
