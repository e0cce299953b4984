"""One damaged small file of one run: that run is named and set aside, the others are analysed."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from analysis.report.write import redraw, refresh
from analysis.tables.sweep_folder import load
from tests.analysis.synthetic_study import Study, write
from trainer.record import RunRecord, read_json

FILES = ("config.yaml", "provenance.json", "summary.json", "metrics.jsonl", "evaluations.jsonl")
BROKEN = {
    "cut": '{"state": "do',
    "binary": "\0\1\2",
    "a list": "[1, 2]\n",
    "a word": "word\n",
    "of lists": '{"step": [1], "config": [2]}\n',
    "nested": "[" * 100_000,
    "of nulls": '{"step": null, "accounting": null, "evaluation_id": null}\n',
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = Study(("transformer",), ("web", "code"), {"r9k": 9e3}, (4.5e5, 9e5), {})
    return write(study, tmp_path_factory.mktemp("written") / "study", np.random.default_rng(0))


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "study")


def first_run(root: Path) -> str:
    return load(root).runs["run_id"].iloc[0]


def refused(root: Path, name: str) -> str:
    """The reason why a run was set aside as damaged."""
    (reason,) = [e.reason for e in load(root).exclusions if e.run_id == name]
    return reason


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("file", FILES)
def test_a_run_with_a_damaged_file_is_set_aside_by_name(root: Path, file: str, text: str) -> None:
    whole, name = load(root), first_run(root)
    (root / name / file).write_text(text)
    table = load(root)
    states = table.runs.set_index("run_id")["status"]
    if states[name] != "damaged":
        # What is lost of this file is not needed: the numbers are those of before.
        if file == "evaluations.jsonl":
            assert "has no rows" in refused(root, name)
            return
        assert file in ("summary.json", "metrics.jsonl")
        assert table.rows["loss_nats"].equals(whole.rows["loss_nats"])
        return
    assert str(root / name) in refused(root, name)
    assert set(states.drop(name)) == {"done"}
    kept = whole.rows[whole.rows["run_id"] != name].reset_index(drop=True)
    assert table.rows.reset_index(drop=True).equals(kept)


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_a_damaged_status_changes_nothing(root: Path, text: str) -> None:
    before = load(root)
    (root / first_run(root) / "STATUS.json").write_text(text)
    assert load(root).rows.equals(before.rows)
    assert load(root).runs.equals(before.runs)


@pytest.mark.parametrize("key", ["accounting", "trunk_id"])
def test_a_run_without_what_the_table_needs_is_set_aside(root: Path, key: str) -> None:
    name = first_run(root)
    file = root / name / "provenance.json"
    stored = json.loads(file.read_text())
    stored[key] = {} if key == "accounting" else stored[key]
    file.write_text(json.dumps(stored))
    states = load(root).runs.set_index("run_id")["status"]
    assert states[name] == ("damaged" if key == "accounting" else "done")


def test_rows_that_were_cut_after_the_seal_set_the_run_aside(root: Path) -> None:
    name = first_run(root)
    summary = read_json(root / name / "summary.json")
    with closing(RunRecord(root / name)) as record:
        record.write_summary({**summary, "rows": record.seals})
    file = root / name / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert "metrics.jsonl are missing or changed" in refused(root, name)


def test_a_folder_that_holds_another_run_is_set_aside(root: Path) -> None:
    name, other = load(root).runs["run_id"].iloc[:2]
    shutil.rmtree(root / name)
    shutil.copytree(root / other, root / name)
    assert f"has the run id {other}" in refused(root, name)
    states = load(root).runs.set_index("run_id")["status"]
    assert dict(states[[name, other]]) == {name: "damaged", other: "done"}


def test_a_damaged_trunk_is_set_aside(root: Path) -> None:
    trunk = next(e for e in root.iterdir() if (e / "STATUS.json").exists() and
                 not (e / "summary.json").exists())  # fmt: skip
    (trunk / "evaluations.jsonl").write_text("[1]\n")
    assert "evaluations.jsonl line 1 is not a row" in refused(root, trunk.name)


@pytest.mark.parametrize("draw", [refresh, redraw])
@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"fingerprint": 1, "text": 5}'])
def test_a_damaged_report_is_drawn_anew(
    root: Path, draw: Callable, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("analysis.report.write._write", lambda *_: drawn.append(1))
    (root / "report").mkdir()
    (root / "report" / "report.json").write_text(text)
    draw(root)
    assert drawn == [1]


def test_a_damaged_list_of_runs_says_how_it_is_made_anew(root: Path) -> None:
    (root / "sweep.yaml").write_text("runs: [1, 2")
    with pytest.raises(ValueError, match=r"sweep\.yaml lists no runs; expand the sweep again"):
        load(root)
