"""Intervals: coverage, clustering, published standard errors, ratios."""

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.estimator import Estimator, fit
from analysis.inference.bootstrap import parameter_intervals, replicate
from analysis.inference.intervals import Interval, ratio_interval, t_interval
from analysis.laws.catalog import CHINCHILLA
from analysis.tables.run_table import final
from analysis.validity.refusal import Refusal
from tests.oracles import fits as oracle


@pytest.fixture(scope="module")
def one_cell(noise_free):
    rows = final(noise_free).rows
    keep = (rows["architecture"] == "mamba") & (rows["corpus"] == "web")
    return rows[keep & (rows["evaluation_set"] == "prose")]


def clustered(rows, generator, trunk_sd, point_sd):
    """The rows with noise that points of one trunk share, and noise of their own."""
    trunks = {name: generator.normal(0.0, trunk_sd) for name in rows["trunk_id"].unique()}
    noise = rows["trunk_id"].map(trunks) + generator.normal(0.0, point_sd, len(rows))
    return rows.assign(loss_nats=rows["loss_nats"] * np.exp(noise))


def many_trunks(rows):
    """The rows of a cell as nine seeds each, so that cases can be resampled."""
    parts = [rows.assign(trunk_id=rows["trunk_id"] + str(seed)) for seed in range(9)]
    return pd.concat(parts, ignore_index=True)


def test_few_trunks_flip_residuals_and_many_resample_cases(one_cell):
    generator = np.random.default_rng(0)
    few = replicate(fit(clustered(one_cell, generator, 0.003, 0.001), CHINCHILLA), 20, generator)
    many = clustered(many_trunks(one_cell), generator, 0.003, 0.001)
    assert few.method.startswith("wild cluster bootstrap over 6 trunks")
    assert replicate(fit(many, CHINCHILLA), 20, generator).method.startswith("case bootstrap")


def test_the_same_generator_gives_the_same_interval(one_cell):
    result = fit(clustered(one_cell, np.random.default_rng(1), 0.003, 0.001), CHINCHILLA)
    first, second = (replicate(result, 30, np.random.default_rng(9)) for _ in range(2))
    np.testing.assert_array_equal(first.theta, second.theta)


def test_warm_starts_reach_the_optimum_of_their_own_sample(one_cell):
    rows = clustered(many_trunks(one_cell), np.random.default_rng(2), 0.003, 0.001)
    result = fit(rows, CHINCHILLA)
    theta = replicate(result, 3, np.random.default_rng(4)).theta[0]
    trunks = np.unique(rows["trunk_id"].to_numpy(dtype=str))
    drawn = trunks[np.random.default_rng(4).integers(len(trunks), size=(3, len(trunks)))][0]
    sample = rows.iloc[np.concatenate([np.flatnonzero(rows["trunk_id"] == t) for t in drawn])]
    again = Estimator(delta=result.delta).fit(sample, CHINCHILLA)
    alpha = theta[result.form.slots["alpha", ""]]
    assert alpha == pytest.approx(again.parameters["alpha"], abs=1e-4)


def test_published_points_give_the_published_standard_errors(chinchilla_rows):
    result = Estimator(delta=1e-3).fit(chinchilla_rows, CHINCHILLA)
    theta = replicate(result, 1500, np.random.default_rng(0)).theta
    values = result.form.natural(theta, "")
    assert np.std(values["alpha"]) == pytest.approx(0.0154, rel=0.1)
    assert np.std(values["beta"]) == pytest.approx(0.0206, rel=0.1)
    assert np.std(np.exp(values["E"])) == pytest.approx(0.0257, rel=0.1)


def test_intervals_of_exponents_cover_the_truth(one_cell, study):
    hits = {"alpha": 0, "beta": 0}
    draws = 60
    for seed in range(draws):
        generator = np.random.default_rng(seed)
        result = fit(clustered(one_cell, generator, 0.003, 0.001), CHINCHILLA)
        intervals = parameter_intervals(result, replicate(result, 100, generator))
        truth = {"alpha": study.law[2], "beta": study.law[4]}
        for name, value in truth.items():
            hits[name] += intervals[name].low <= value <= intervals[name].high
    assert 0.88 <= hits["alpha"] / draws <= 1.0
    assert 0.88 <= hits["beta"] / draws <= 1.0


def test_a_t_interval_is_the_textbook_one():
    result = t_interval(np.array([1.0, 2.0, 4.0]), "sizes")
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / np.sqrt(3)
    assert (result.low, result.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_one_cluster_gives_a_refusal():
    assert isinstance(t_interval(np.array([1.0]), "sizes"), Refusal)


def test_a_ratio_interval_holds_the_ratios_that_a_t_test_keeps():
    generator = np.random.default_rng(3)
    numerator = generator.normal(0.08, 0.004, 5)
    denominator = generator.normal(0.02, 0.003, 5)
    result = ratio_interval(numerator, denominator)
    low, high = oracle.ratios_not_rejected(numerator, denominator, np.linspace(2, 12, 10_001))
    assert (result.low, result.high) == pytest.approx((low, high), abs=2e-3)


def test_a_ratio_is_of_sizes_whatever_the_signs():
    numerator, denominator = np.array([8.0, 8.2, 7.9, 8.1]), np.array([-2.0, -2.1, -1.9, -2.2])
    result = ratio_interval(numerator, denominator)
    assert 0 < result.low < result.estimate < result.high


def test_a_ratio_over_something_that_may_be_zero_is_refused():
    result = ratio_interval(np.array([8.0, 8.2, 7.9]), np.array([-1.0, 1.0, 0.2]))
    assert isinstance(result, Refusal)
    assert result.code == "R-RATIO"


def test_statistics_undefined_in_many_replicates_are_refused(one_cell):
    result = fit(clustered(one_cell, np.random.default_rng(5), 0.003, 0.001), CHINCHILLA)
    replicates = replicate(result, 40, np.random.default_rng(0))
    values = np.linspace(0.9, 1.1, 40)
    assert isinstance(replicates.interval(1.0, values), Interval)
    values[:3] = np.inf
    refused = replicates.interval(1.0, values)
    assert isinstance(refused, Refusal)
    assert refused.code == "R-MULT"
