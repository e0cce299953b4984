"""The architecture effect corrected for tuning: what moves it, what refuses it, what leaves it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.effects.answer import answer
from analysis.effects.contrasts import Contrast
from analysis.effects.tuned_contrast import correction_of
from analysis.effects.tuning import BRACKETED, EDGE, FLAT, INSIDE, Gap
from analysis.inference.intervals import Interval
from analysis.study.headline import headline
from analysis.study.study import Settings, analyse
from analysis.tables.run_table import Table, final
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from tests.analysis.synthetic_study import Study, write

EFFECT = math.log(0.9)
STUDY = Study(
    sizes={"r9k": 9e3, "r30k": 3e4, "r100k": 1e5}, horizons=(9e5, 1.8e6), seeds={"r30k": (0, 1)},
    probed=("r9k", "r100k"), architecture_effect=EFFECT, corpus_effect=0.02,
)  # fmt: skip
CASES = {
    "right": {},
    "right, another": {"transformer": (0.2, -0.2), "mamba": (-0.2, 0.1)},
    "rate x 8": {"transformer": (-3.0, 0.0)},
    "batch x 8": {"transformer": (0.0, -3.0)},
    "other rate x 8": {"mamba": (-3.0, 0.0)},
    "rate x 2": {"transformer": (-1.0, 0.0)},
    "batch / 2": {"mamba": (0.0, 1.0)},
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Table]:
    root = tmp_path_factory.mktemp("runs")
    return {
        name: final(
            load(write(replace(STUDY, optimum=best), root / name, np.random.default_rng(2)))
        )
        for name, best in CASES.items()
    }


def arm(table):
    return answer(table, "prose").arms[0]


@pytest.mark.parametrize("case", ["right", "right, another"])
def test_arms_at_the_right_rate_and_batch_are_not_corrected(tables, case):
    found = answer(tables[case], "prose")
    assert {each.verdict for each in found.gaps} <= {BRACKETED, FLAT}
    first = found.arms[0]
    assert first.tuned.effect.estimate == first.contrast.effect.estimate
    assert first.tuned.tuning_error.error > 0
    assert "16 tuning probes" in first.tuned.effect.method
    assert isinstance(first.ratio, Interval)


@pytest.mark.parametrize(
    ("case", "name", "run"),
    [
        ("rate x 8", "transformer", "r9k at 0.25 x its learning rate"),
        ("batch x 8", "transformer", "r9k at 0.25 x its batch"),
        ("other rate x 8", "mamba", "r100k at 0.25 x its learning rate"),
    ],
)
def test_an_arm_eight_times_off_refuses_the_sign_and_names_arm_rung_and_run(
    tables, case, name, run
):
    first = arm(tables[case])
    # As measured the effect is far from the truth and looks certain.
    assert first.contrast.effect.excludes(EFFECT)
    assert first.contrast.effect.excludes(0.0)
    for refused in (first.tuned, first.ratio):
        assert isinstance(refused, Refusal)
        assert refused.code == "R-TUNING"
        assert f"{name} at r9k" in refused.reason
        assert f"{name} {run}" in refused.remedy


@pytest.mark.parametrize("case", ["rate x 2", "batch / 2"])
def test_an_arm_two_times_off_is_corrected_to_the_truth(tables, case):
    found = answer(tables[case], "prose")
    assert {each.verdict for each in found.gaps if each.clear} == {INSIDE}
    first = found.arms[0]
    assert first.contrast.effect.excludes(EFFECT)
    # Sizes of the arms differ by 2 %, which moves the effect by less than the interval.
    assert first.tuned.effect.low < EFFECT + 0.005
    assert first.tuned.effect.high > EFFECT - 0.005
    assert first.tuned.effect.estimate == pytest.approx(EFFECT, abs=0.01)
    assert first.tuned.nats.excludes(0.0)


def test_a_sign_that_better_tuning_can_only_strengthen_stands_without_an_end(tables):
    """The other arm is better although its own rate is off: no better rate can change the sign."""
    table = tables["right"]
    probes = table.probes
    off = (probes["architecture"] == "mamba") & (probes["learning_rate_factor"] == 0.5)
    better = np.where(off, 0.9 * probes["loss_in_use"], probes["loss_nats"])
    first = arm(replace(table, probes=probes.assign(loss_nats=better)))
    assert first.tuned.open_ended
    assert first.tuned.effect.low == -math.inf
    assert first.tuned.effect.high < first.contrast.effect.high
    # The corpus effect is the smaller one at any such rate, so their order stands too.
    assert first.ratio.low == 0.0
    assert first.ratio.high < 1


def test_an_order_that_better_tuning_may_change_is_refused(tables):
    table = tables["right"]
    probes, rows = table.probes, table.rows
    large = np.where(rows["corpus"] == "code", 1.3, 1.0)
    off = (probes["architecture"] == "mamba") & (probes["learning_rate_factor"] == 0.5)
    better = np.where(off, 0.9 * probes["loss_in_use"], probes["loss_nats"])
    changed = replace(
        table,
        rows=rows.assign(loss_nats=rows["loss_nats"] * large),
        probes=probes.assign(loss_nats=better),
    )
    first = arm(changed)
    assert isinstance(first.tuned, Contrast)
    assert isinstance(first.ratio, Refusal)
    assert first.ratio.code == "R-TUNING"


def test_a_study_without_probes_is_as_measured(tables):
    first = arm(replace(tables["rate x 8"], probes=tables["right"].probes[:0]))
    assert first.tuned is first.contrast


def test_other_evaluation_sets_are_not_corrected(tables):
    first = answer(tables["rate x 2"], "code").arms[0]
    assert first.tuned is first.contrast


def gap(parameters, estimate, error, low, direction="learning rate"):
    interval = Interval(estimate, low, estimate + 2 * error, "")
    return Gap("a", "r", parameters, direction, INSIDE, interval, error, 1.0, (), 2)


def test_a_correction_is_interpolated_between_rungs_and_held_beyond_them():
    gaps = [gap(1e4, 0.02, 0.003, 0.01), gap(1e6, 0.04, 0.004, 0.03)]
    correction = correction_of([*gaps, gap(1e6, 0.01, 0.001, 0.005, "batch")])
    np.testing.assert_allclose(
        correction.at([1e3, 1e4, 1e5, 1e6, 1e7]), [0.02, 0.02, 0.035, 0.05, 0.05]
    )
    # By hand: at 1e5 half of each rung, whose directions' errors add up.
    assert correction.error(np.array([1e5])) == pytest.approx(math.hypot(0.0015, 0.0025))
    assert correction.error(np.array([1e3, 1e7])) == pytest.approx(math.hypot(0.0015, 0.0025))


def test_a_gap_within_noise_moves_nothing_but_adds_its_error():
    correction = correction_of([gap(1e4, 0.004, 0.003, 0.0)])
    assert correction.at(np.array([1e4])) == 0.0
    assert correction.error(np.array([1e4])) == pytest.approx(0.003)


def test_the_headline_takes_the_tuned_effect_or_its_refusal(tables):
    settings = Settings(replicates=20)
    refused = headline(analyse(tables["rate x 8"], settings))
    assert isinstance(refused.architecture, Refusal)
    assert isinstance(refused.ratio, Refusal)
    assert refused.multipliers["architecture"].code == "R-TUNING"
    moved = headline(analyse(tables["rate x 2"], settings))
    assert moved.architecture.effect.estimate == pytest.approx(EFFECT, abs=0.01)
    assert moved.multipliers["architecture"].code == "R-TUNING"
    kept = headline(analyse(tables["right"], settings))
    assert "tuning probes" in kept.architecture.effect.method
    assert {each.verdict for each in answer(tables["rate x 8"], "prose").gaps} >= {EDGE}
