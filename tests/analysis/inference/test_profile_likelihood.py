"""Profiles: the curve that a slow refit gives, open where the data set no end."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from analysis.fitting.estimator import Estimator
from analysis.inference.cluster_robust import parameter_interval, sandwich
from analysis.inference.profile_likelihood import _crossing, _curvature, _walk, profile
from analysis.laws.catalog import CHINCHILLA, nested_family
from tests.oracles import fits as oracle


def runs(floor, generator, sd=0.005):
    """Thirty runs of a Chinchilla law with noise in ln L."""
    sizes, ratios = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 5)
    rows = pd.DataFrame([{"parameters": n, "tokens": n * r} for n in sizes for r in ratios])
    loss = oracle.chinchilla((floor, 300.0, 0.33, 600.0, 0.33), rows["parameters"], rows["tokens"])
    return rows.assign(loss_nats=loss * np.exp(generator.normal(0.0, sd, len(rows))))


@pytest.fixture(scope="module")
def fitted():
    return Estimator(delta=np.inf).fit(runs(1.8, np.random.default_rng(0)), CHINCHILLA)


def test_a_profile_is_the_best_of_the_other_parameters(fitted):
    result = profile(fitted, "beta")
    place = 4
    rows = fitted.rows

    def held(others):
        e, a, alpha, b = np.exp(others)
        values = (e, a, alpha, b, result.values[place])
        columns = [rows[name].to_numpy() for name in ("parameters", "tokens", "loss_nats")]
        return 1e3 * oracle.huber_sum(values, *columns, np.inf)

    start = np.log([fitted.parameters[name] for name in ("E", "A", "alpha", "B")])
    for _ in range(6):
        start = minimize(held, start, method="Nelder-Mead", options={"maxiter": 3000}).x
    rise = held(start) / 1e3 - fitted.objective
    slot = fitted.form.labels.index("beta")
    error = sandwich(fitted).error_and_freedom(np.eye(5)[[slot]])[0][0]
    expected = rise / (0.5 * _curvature(fitted, slot) * error**2)
    assert result.rise[place] == pytest.approx(expected, rel=2e-3)


def test_near_the_optimum_profile_and_plain_interval_agree(fitted):
    result, plain = profile(fitted, "beta"), parameter_interval(fitted, sandwich(fitted), "beta")
    assert (result.low, result.high) == pytest.approx((plain.low, plain.high), rel=0.1)


def test_a_floor_that_the_data_do_not_set_has_no_lower_end():
    result = Estimator().fit(runs(0.02, np.random.default_rng(1), 0.02), CHINCHILLA)
    floor = profile(result, "E")
    assert floor.low is None
    assert floor.high is not None
    assert "no lower end" in floor.words


def test_a_second_valley_belongs_to_the_interval():
    offsets = np.arange(6.0)
    result = _crossing(offsets, np.array([0.0, 2.0, 5.0, 3.0, 9.0, 16.0]), 4.0)
    assert result == pytest.approx(3 + (2 - 3**0.5) / (3 - 3**0.5))


def test_profiles_of_arms_that_share_no_parameter_are_those_of_each_alone():
    arms = [runs(floor, np.random.default_rng(seed)) for seed, floor in enumerate((1.8, 2.1))]
    both = pd.concat([rows.assign(arm=str(i)) for i, rows in enumerate(arms)], ignore_index=True)
    joint = Estimator(delta=np.inf).fit(both, nested_family(("arm",))["Mfull"])
    for place, rows in enumerate(arms):
        alone = Estimator(delta=np.inf).fit(rows, CHINCHILLA)
        result, expected = profile(joint, f"beta [{place}]"), profile(alone, "beta")
        assert result.estimate == pytest.approx(expected.estimate, rel=1e-4)
        assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=0.01)


@pytest.mark.parametrize(("floor", "seed", "sign"), [(0.4, 2, -1.0), (0.05, 2, 1.0)])
def test_an_end_at_a_wall_is_where_a_fine_walk_finds_it(floor, seed, sign):
    # The floor is used up on the way, and the curve turns up: a line over a whole step of the
    # profile misses the end by 10 and 26 per cent of the half-width.
    fit = Estimator().fit(runs(floor, np.random.default_rng(seed), 0.04), CHINCHILLA)
    slot = fit.form.labels.index("alpha")
    result = profile(fit, "alpha")
    error = sandwich(fit).error_and_freedom(np.eye(5)[[slot]])[0][0]
    end = result.low if sign < 0 else result.high
    fine = fit.theta[slot] + np.linspace(0.0, 1.5 * (end - fit.theta[slot]), 801)
    rise = _walk(fit, slot, fine) / (0.5 * _curvature(fit, slot) * error**2)
    passed = fine[np.flatnonzero(rise <= result.threshold)[-1]]
    assert end == pytest.approx(passed, abs=0.02 * abs(fit.theta[slot] - passed))
