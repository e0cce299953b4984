"""What is trained already is not to be trained again, and is not counted again."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from launch.plan import Plan, make_plan
from launch.progress import LINE_SECONDS, Progress, stretches, trained_tokens
from launch.sweep import _Redraw
from sweeps.grammar import read_sweep_file
from tests.launch.command import ROOT

NANO = ("ladder=nano", "architectures=[transformer]", "ladders.nano.rungs=[10k]")
MORE = "ladders.nano.horizons=[225280,450560,901120]"


def plan(folder: Path, *words: str) -> Plan:
    return make_plan(read_sweep_file(ROOT / "sweeps" / "scaling.yaml", [*NANO, *words]), folder)


def finish(made: Plan, folder: Path) -> None:
    """Statuses of a study whose runs have all ended."""
    for unit in made.units:
        assert unit.trunk is not None
        for experiment, name in (
            (unit.trunk, unit.trunk.trunk_id),
            *((e, e.folder_name) for e in unit.branches),
        ):
            (folder / name).mkdir(parents=True)
            status = {"state": "done", "step": experiment.run.steps}
            (folder / name / "STATUS.json").write_text(json.dumps(status))


def trained(made: Plan, folder: Path) -> list[int]:
    return [trained_tokens(mine) for mine in stretches(made, folder).values()]


def test_nothing_is_left_of_a_finished_study(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert trained(made, tmp_path) == [0] * len(made.units)
    finish(made, tmp_path)
    assert trained(made, tmp_path) == [unit.tokens for unit in made.units]


def test_a_further_horizon_adds_its_own_tokens_alone(tmp_path: Path) -> None:
    finish(plan(tmp_path), tmp_path)
    more = plan(tmp_path, MORE)
    for unit, done in zip(more.units, trained(more, tmp_path), strict=True):
        # From the last fork before, 80 % of 450,560 tokens, to the end of the new horizon.
        assert unit.tokens - done == 901_120 - 360_448


def test_a_line_tells_what_runs_and_how_far_all_are(tmp_path: Path) -> None:
    made = plan(tmp_path)
    unit = made.units[0]
    assert unit.trunk is not None
    folder = tmp_path / unit.trunk.trunk_id
    folder.mkdir()
    (folder / "STATUS.json").write_text(
        json.dumps({"state": "running", "step": 10, "steps": 88, "loss_nats": 3.25})
    )
    text = io.StringIO()
    console = Console(file=text, width=200)
    shown = Progress(made, tmp_path, list(made.units), console)
    shown._spoke -= LINE_SECONDS + 1
    shown.tick()
    total = sum(each.tokens for each in made.units) / 1e6
    line = text.getvalue()
    assert line.startswith(f"0.02 of {total:.2f} M tokens")
    assert f"transformer {unit.trunk.run.corpus.name} 10k trunk step 10/88 loss 3.250" in line


def test_an_ended_run_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(tmp_path)
    finish(made, tmp_path)
    text = io.StringIO()
    shown = Progress(made, tmp_path, list(made.units), Console(file=text, width=200))
    monkeypatch.setattr("launch.progress.read_status", lambda folder: pytest.fail(str(folder)))
    shown._spoke -= LINE_SECONDS + 1
    shown.tick()
    total = sum(each.tokens for each in made.units) / 1e6
    assert text.getvalue().startswith(f"{total:.2f} of {total:.2f} M tokens")


def test_a_trunk_that_is_to_go_on_is_read_again(tmp_path: Path) -> None:
    finish(plan(tmp_path), tmp_path)
    more = plan(tmp_path, MORE)
    text = io.StringIO()
    shown = Progress(more, tmp_path, list(more.units), Console(file=text, width=200))
    for unit in more.units:
        assert unit.trunk is not None
        status = {"state": "running", "step": max(unit.forks), "steps": max(unit.forks)}
        (tmp_path / unit.trunk.trunk_id / "STATUS.json").write_text(json.dumps(status))
    shown._spoke -= LINE_SECONDS + 1
    shown.tick()
    left = sum(901_120 - max(unit.forks) * 2048 for unit in more.units) / 1e6
    total = sum(unit.tokens for unit in more.units) / 1e6
    assert text.getvalue().startswith(f"{total - left:.2f} of {total:.2f} M tokens")


def test_a_terminal_shows_what_runs(tmp_path: Path) -> None:
    made = plan(tmp_path)
    trunk = made.units[0].trunk
    assert trunk is not None
    (tmp_path / trunk.trunk_id).mkdir()
    status = {"state": "running", "step": 10, "steps": 88, "tokens_per_second": 5e4}
    (tmp_path / trunk.trunk_id / "STATUS.json").write_text(json.dumps(status))
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system=None)
    with Progress(made, tmp_path, list(made.units), console) as tick:
        tick()
    total = sum(each.tokens for each in made.units) / 1e6
    assert "step 10/88" in text.getvalue()
    assert "50 k tokens/s" in text.getvalue()
    assert f"0.02/{total:.2f} M tokens" in text.getvalue()


def test_redraws_leave_the_processors_to_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = [0.0], []

    def draw(command: list[str], **_: object) -> subprocess.CompletedProcess:
        now[0] += 100
        drawn.append(now[0])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("launch.sweep.time.monotonic", lambda: now[0])
    monkeypatch.setattr("launch.sweep.subprocess.run", draw)
    redraw = _Redraw(tmp_path)
    for run in range(3000):
        now[0] += 1
        (tmp_path / f"run{run}").mkdir()
        (tmp_path / f"run{run}" / "summary.json").touch()
        redraw.tick()
        redraw.wait()
    # 100 s of drawing, then a pause of 1,000.
    assert [round(each) for each in np.diff(drawn)] == [1100, 1100]
