"""What is trained already is not to be trained again, and is not counted again."""

import json
from pathlib import Path

from launch.plan import Plan, make_plan
from launch.progress import trained_tokens
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


def test_nothing_is_left_of_a_finished_study(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert all(trained_tokens(made, unit, tmp_path) == 0 for unit in made.units)
    finish(made, tmp_path)
    assert all(trained_tokens(made, unit, tmp_path) == unit.tokens for unit in made.units)


def test_a_further_horizon_adds_its_own_tokens_alone(tmp_path: Path) -> None:
    finish(plan(tmp_path), tmp_path)
    more = plan(tmp_path, MORE)
    for unit in more.units:
        left = unit.tokens - trained_tokens(more, unit, tmp_path)
        # From the last fork before, 80 % of 450,560 tokens, to the end of the new horizon.
        assert left == 901_120 - 360_448
