"""The shipped ladder for a cluster: what its plan promises."""

import re
from pathlib import Path

import pytest

from analysis.planning.expected_precision import USUAL, evaluation_error
from launch.plan import Plan, expected_lines, make_plan, on_absent_gpu
from launch.tuning_plan import tuning_lines
from sweeps.grammar import read_sweep_file

SCALING = Path(__file__).parent.parent.parent / "sweeps" / "scaling.yaml"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    words = ("ladder=pile", "corpus=pile", "launcher.cluster=slurm")
    return make_plan(read_sweep_file(SCALING, words), tmp_path_factory.mktemp("pile"))


def test_the_plan_refuses_nothing_and_sees_effects_of_one_percent(plan: Plan) -> None:
    text = "\n".join(expected_lines(plan, Path("/nowhere")))
    assert "refused" not in text
    for factor in ("corpus", "architecture"):
        found = re.search(rf"{factor} effect: .* detects ([\d.]+) % with", text)
        assert found is not None
        assert float(found[1]) <= 1.0


def test_its_rates_have_a_source_and_its_tuning_is_probed(plan: Plan) -> None:
    lines = tuning_lines(plan)
    assert sum("Gu and Dao 2023" in line for line in lines) == 2
    assert "tuning probes: 8 runs" in lines[-1]


def test_times_without_a_gpu_at_hand_are_those_of_a_named_gpu(plan: Plan) -> None:
    planned = next(each for each in plan.runs if each.unit.trunk is None)
    if not on_absent_gpu(planned.experiment):
        pytest.skip("there is a GPU here, whose speed is measured instead")
    hours = plan.seconds[planned.unit.name] / 3600
    assert hours == pytest.approx(planned.flops / (8 * 0.4 * 989e12) / 3600, rel=1e-9)


def test_the_error_of_documents_falls_as_the_root_of_the_tokens() -> None:
    assert evaluation_error(None) == USUAL.noise.evaluation
    assert evaluation_error(311_000) == pytest.approx(USUAL.noise.evaluation)
    assert evaluation_error(100 * 311_000) == pytest.approx(USUAL.noise.evaluation / 10)
