"""Nested families: owners of parameters, criteria, the hold-out, one effect with its interval."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.fitting.estimator import Estimator
from analysis.inference.intervals import Interval
from analysis.inference.model_selection import _folds, choose, effect, hold_out_errors, omnibus_test
from analysis.laws.catalog import nested_family
from analysis.validity.refusal import Refusal
from tests.oracles import fits as slow

LIGHT = Estimator(grid=np.geomspace(0.03, 1.3, 12), starts=4)
BY = ("architecture",)


def arms(shift, sd=0.003, corpora=("web",)):
    sizes, ratios = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 4)
    rows = pd.DataFrame(
        [
            {"architecture": arm, "corpus": corpus, "parameters": n, "tokens": n * r}
            for arm in "ab"
            for corpus in corpora
            for n in sizes
            for r in ratios
        ]
    )
    noise = np.random.default_rng(0).normal(0, sd, len(rows))
    gain = np.where(rows["architecture"] == "b", 1.0 + shift, 1.0)
    loss = slow.chinchilla(
        (1.8, 400.0, 0.34, 900.0, 0.36), rows["parameters"], gain * rows["tokens"]
    )
    rows["trunk_id"] = rows["architecture"] + rows["corpus"] + rows["parameters"].astype(str)
    return rows.assign(loss_nats=loss * np.exp(noise))


def test_a_difference_in_data_efficiency_is_found_by_every_criterion():
    result = choose(arms(0.6), nested_family(BY), LIGHT)
    scores = result.table.set_index("law")
    assert result.description == "Mb"
    assert scores.loc["Mb", "AICc"] < scores.loc["M0", "AICc"] - 10
    assert scores.loc["Mb", "hold_out"] < scores.loc["M0", "hold_out"]


def test_arms_without_a_difference_get_the_law_without_one():
    result = choose(arms(0.0), nested_family(BY), LIGHT)
    assert result.description == "M0"
    assert result.forecast == "M0"


def test_a_hold_out_error_is_that_of_a_fit_without_the_fold():
    rows = arms(0.3)
    fit = Estimator(delta=np.inf).fit(rows, nested_family(BY)["Mb"])
    folds = _folds(rows)
    errors = hold_out_errors(fit, folds)
    kept = rows[folds != 2].reset_index(drop=True)
    again = Estimator(delta=np.inf).fit(kept, nested_family(BY)["Mb"])
    left = rows[folds == 2]
    expected = np.log(left["loss_nats"]) - np.log(again.predict(left))
    np.testing.assert_allclose(errors[folds == 2], expected, atol=2e-6)


def test_folds_keep_trunks_whole():
    rows = arms(0.0)
    folds = pd.Series(_folds(rows))
    assert (folds.groupby(rows["trunk_id"]).nunique() == 1).all()


def test_an_effect_is_the_mean_difference_of_both_laws_at_the_same_places():
    rows = arms(0.5, sd=0.0005)
    fit = Estimator().fit(rows, nested_family(BY)["Mab"])
    result = effect(fit, "a", "b")
    size, tokens = rows["parameters"], rows["tokens"]
    law = (1.8, 400.0, 0.34, 900.0, 0.36)
    sides = [np.log(slow.chinchilla(law, size, gain * tokens)) for gain in (1.5, 1.0)]
    assert result.estimate == pytest.approx(float((sides[0] - sides[1]).mean()), abs=5e-4)
    assert result.excludes(0.0)


def test_swapping_the_arms_turns_the_effect_around():
    fit = LIGHT.fit(arms(0.5), nested_family(BY)["Mab"])
    there, back = effect(fit, "a", "b"), effect(fit, "b", "a")
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), rel=1e-9)


def three_arms(shift, seed, sd=0.004):
    """Three arms on six sizes times four ratios; the last one's loss is shifted."""
    sizes, ratios = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 4)
    rows = pd.DataFrame(
        [
            {"architecture": arm, "parameters": n, "tokens": n * r}
            for arm in "abc"
            for n in sizes
            for r in ratios
        ]
    )
    noise = np.random.default_rng(seed).normal(0, sd, len(rows))
    loss = slow.chinchilla((1.8, 400.0, 0.34, 900.0, 0.36), rows["parameters"], rows["tokens"])
    return rows.assign(loss_nats=loss * np.exp(noise + shift * (rows["architecture"] == "c")))


def test_one_effect_alone_is_tested_as_its_interval_says():
    fit = LIGHT.fit(arms(0.08), nested_family(BY)["Mab"])
    interval, test = effect(fit, "a", "b"), omnibus_test(fit)
    half = 0.5 * (interval.high - interval.low)
    freedom = test.freedom[1]
    assert test.freedom[0] == 1.0
    quantile = stats.t.ppf(0.975, freedom)
    assert test.statistic == pytest.approx((interval.estimate * quantile / half) ** 2, rel=1e-6)
    assert (test.p < 0.05) == interval.excludes(0.0)


def test_arms_that_are_alike_are_told_apart_one_time_in_twenty():
    law = nested_family(BY)["Mab"]
    result = [omnibus_test(LIGHT.fit(three_arms(0.0, seed), law)).p < 0.05 for seed in range(120)]
    assert stats.binom.cdf(sum(result), 120, 0.065) > 1e-3
    assert stats.binom.sf(sum(result) - 1, 120, 0.065) > 1e-3
    assert omnibus_test(LIGHT.fit(three_arms(-0.01, 0), law)).p < 1e-3


@pytest.mark.parametrize(("per_arm", "refused"), [(1, True), (2, False)])
def test_an_arm_of_a_single_trunk_is_refused(per_arm, refused):
    rows = three_arms(0.0, 0)
    half = rows["parameters"].rank(method="dense").astype(int) % per_arm
    rows["trunk_id"] = rows["architecture"] + half.astype(str)
    fit = LIGHT.fit(rows, nested_family(BY)["Mab"])
    assert isinstance(effect(fit, "a", "b"), Refusal) == refused
    assert not refused or "one trunk" in omnibus_test(fit).reason


def test_more_arms_than_their_trunks_can_tell_apart_are_refused():
    copies = [three_arms(0.0, seed).assign(copy=str(seed)) for seed in (0, 1)]
    rows = pd.concat(copies, ignore_index=True)
    rows["architecture"] += rows["copy"]
    rows["trunk_id"] = rows["architecture"] + (rows["parameters"] > 1e8).astype(str)
    fit = LIGHT.fit(rows, nested_family(BY)["Mab"])
    assert isinstance(effect(fit, "a0", "b0"), Interval)
    assert "degrees of freedom" in omnibus_test(fit).reason
