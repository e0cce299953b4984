"""Forecasts: errors of the past widen the future, and their absence is said."""

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Estimator
from analysis.inference.backtest import ASSUMED_RATE, backtest, forecast
from analysis.laws.catalog import CHINCHILLA, POWER
from tests.oracles import fits as slow

LIGHT = Estimator(grid=np.geomspace(0.03, 1.3, 12), starts=4)


def runs(curvature, decades):
    sizes, ratios = np.geomspace(1e7, 1e7 * 10 ** (decades / 2), 7), np.geomspace(5, 100, 4)
    rows = pd.DataFrame([{"parameters": n, "tokens": n * r} for n in sizes for r in ratios])
    loss = slow.chinchilla((1.8, 400.0, 0.34, 900.0, 0.36), rows["parameters"], rows["tokens"])
    noise = np.random.default_rng(0).normal(0, 0.002, len(rows))
    turn = curvature * np.log10(rows["parameters"] / 1e7) ** 2
    flops = 6.0 * rows["parameters"] * rows["tokens"]
    return rows.assign(loss_nats=loss * np.exp(noise + turn), flops=flops)


def test_a_forecast_never_sees_the_runs_it_is_judged_by():
    rows = runs(0.0, 4.0)
    above = rows["flops"].to_numpy() > rows["flops"].max() / 10.0
    spoiled = rows.assign(loss_nats=np.where(above, 9.0, rows["loss_nats"]))
    before, after = (backtest(LIGHT, each, CHINCHILLA).errors for each in (rows, spoiled))
    last = before["cut"] == 10.0
    shift = (np.log(9.0) - np.log(rows["loss_nats"].to_numpy()))[above]
    np.testing.assert_allclose(after["error"][last] - before["error"][last], shift, atol=1e-9)


def test_a_law_that_bends_away_has_a_larger_rate():
    straight = backtest(LIGHT, runs(0.0, 4.0), CHINCHILLA)
    curved = backtest(LIGHT, runs(0.02, 4.0), CHINCHILLA)
    assert not straight.assumed
    assert curved.rate > 2 * straight.rate


def test_data_too_narrow_for_a_back_test_get_the_assumed_rate():
    result = backtest(LIGHT, runs(0.0, 0.1), CHINCHILLA)
    assert result.assumed
    assert result.rate == ASSUMED_RATE
    assert "assumed" in result.words


def test_the_half_width_is_made_of_the_four_named_parts():
    rows = runs(0.0, 4.0)
    fit = LIGHT.fit(rows, CHINCHILLA)
    beyond = pd.DataFrame({"parameters": [1e8, 5e9], "tokens": [2e9, 2e11]})
    result = forecast(fit, LIGHT, beyond).rows
    parts = result[["s_fit", "sigma", "s_backtest", "s_laws"]].to_numpy()
    half = np.log(result["high"] / result["estimate"])
    np.testing.assert_allclose(half, 2 * np.sqrt((parts**2).sum(axis=1)), rtol=1e-9)
    assert parts[0, 2] == parts[0, 3] == 0.0
    assert (parts[1] > 0).all()


def test_beyond_the_data_the_interval_is_wider_than_fit_and_noise():
    rows = runs(0.01, 4.0)
    fit = LIGHT.fit(rows, CHINCHILLA)
    beyond = pd.DataFrame({"parameters": [1e10], "tokens": [4e11]})
    result = forecast(fit, LIGHT, beyond).rows.iloc[0]
    assert np.log(result["high"] / result["estimate"]) > 2 * np.hypot(
        result["s_fit"], result["sigma"]
    )


def test_a_power_law_in_compute_is_back_tested_too():
    rows = runs(0.0, 4.0)
    assert backtest(LIGHT, rows, POWER).errors["law"].eq("power").all()
