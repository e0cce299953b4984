"""Allocation: the closed form where there is one, any counter elsewhere, refusals at the ends."""

import numpy as np
import pandas as pd
import pytest

from analysis.compute_optimal.allocation import Allocation, Ladder, Question, allocate, cheapest
from analysis.fitting.estimator import Estimator
from analysis.inference.bootstrap import replicate
from analysis.laws.catalog import CHINCHILLA
from analysis.tables.run_region import SizeCurve
from analysis.validity.refusal import Refusal
from tests.oracles import fits as oracle

LAW = (1.8, 400.0, 0.34, 900.0, 0.36)
RANGE = (1e6, 1e11)


@pytest.fixture(scope="module")
def fit():
    sizes, ratios = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 5)
    rows = pd.DataFrame([{"parameters": n, "tokens": n * r} for n in sizes for r in ratios])
    loss = oracle.chinchilla(LAW, rows["parameters"], rows["tokens"])
    noise = np.random.default_rng(0).normal(0.0, 0.003, len(rows))
    names = [str(place) for place in range(len(rows))]
    rows = rows.assign(loss_nats=loss * np.exp(noise), trunk_id=names, architecture="a", corpus="c")
    return Estimator().fit(rows, CHINCHILLA)


def six_nd(parameters, tokens):
    return 6.0 * parameters * tokens


def test_with_six_n_d_the_best_size_is_the_closed_form(fit):
    p, budget = fit.parameters, 1e20
    result = allocate(Question(fit, "", six_nd, RANGE), budget)
    total = p["alpha"] + p["beta"]
    scale = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / total)
    assert result.parameters == pytest.approx(scale * (budget / 6) ** (p["beta"] / total), rel=1e-4)
    assert six_nd(result.parameters, result.tokens) == pytest.approx(budget, rel=1e-6)


def test_no_other_size_within_the_budget_has_a_lower_loss(fit):
    def quadratic(parameters, tokens):
        return 6.0 * parameters * tokens + 4e4 * np.sqrt(parameters) * tokens

    result = allocate(Question(fit, "", quadratic, RANGE), 3e19)
    for size in result.parameters * np.array([0.8, 0.97, 1.03, 1.25]):
        tokens = 3e19 / quadratic(size, 1.0)
        values = [fit.parameters[name] for name in ("E", "A", "alpha", "B", "beta")]
        assert oracle.chinchilla(values, size, tokens) > result.loss


def test_tokens_to_be_served_make_the_best_model_smaller(fit):
    def serving(parameters):
        return 2.0 * parameters

    alone = cheapest(Question(fit, "", six_nd, RANGE), 2.3)
    served = cheapest(Question(fit, "", six_nd, RANGE, serving, served=1e12), 2.3)
    assert served.parameters < 0.8 * alone.parameters
    assert served.tokens > alone.tokens


def test_an_expensive_token_of_a_slow_kernel_asks_for_a_smaller_model(fit):
    def seconds(parameters, tokens):
        return 1e-15 * parameters**1.3 * tokens

    flops = allocate(Question(fit, "", six_nd, RANGE), 1e20)
    wall = allocate(
        Question(fit, "", seconds, RANGE), float(seconds(flops.parameters, flops.tokens))
    )
    assert wall.parameters < flops.parameters


def test_a_ladder_gives_what_its_rungs_cost_and_refuses_other_sizes():
    ladder = Ladder(SizeCurve(np.array([1e6, 1e8]), np.array([1e7, 1e9])))
    np.testing.assert_allclose(ladder(np.array([1e6, 1e7]), np.array([2.0, 2.0])), [2e7, 2e8])
    with pytest.raises(ValueError, match="count more rungs"):
        ladder(np.array([1e9]), np.array([1.0]))
    with pytest.raises(ValueError, match="count at least two rungs"):
        Ladder(SizeCurve(np.array([1e6]), np.array([1e7])))


def test_a_size_curve_is_the_median_at_each_size_and_keeps_its_power_beyond():
    sizes, values = np.array([1e6, 1e6, 1e6, 1e8]), np.array([1.0, 2.0, 9.0, 200.0])
    queried = np.array([1e5, 1e6, 1e7, 1e9])
    flat = SizeCurve.medians(sizes, values)
    np.testing.assert_allclose(flat(queried), [2.0, 2.0, 20.0, 200.0])
    growing = SizeCurve.medians(sizes, values, beyond=1.0)
    np.testing.assert_allclose(growing(queried), [0.2, 2.0, 20.0, 2000.0])


def test_a_best_size_at_the_end_of_the_range_is_refused(fit):
    result = allocate(Question(fit, "", six_nd, (1e6, 1e8)), 1e22)
    assert isinstance(result, Refusal)
    assert "end of the range" in result.reason


def test_a_loss_below_the_floor_is_refused(fit):
    assert isinstance(cheapest(Question(fit, "", six_nd, RANGE), 0.5), Refusal)


def test_the_best_size_has_an_interval_that_holds_the_true_one(fit):
    replicates = replicate(fit, 60, np.random.default_rng(1))
    result = allocate(Question(fit, "", six_nd, RANGE), 1e20, replicates)
    assert isinstance(result, Allocation)
    _, a, alpha, b, beta = LAW
    scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    truth = scale * (1e20 / 6) ** (beta / (alpha + beta))
    assert result.size_interval.low < truth < result.size_interval.high
