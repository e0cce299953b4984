"""Shape-robust intervals: between its points a law of wrong shape is no longer biased."""

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.estimator import Estimator
from analysis.inference.cluster_robust import prediction_errors, sandwich
from analysis.inference.shape_robust import shape_robust
from analysis.laws.bound import log_loss
from analysis.laws.catalog import CHINCHILLA, POWER

SQUARES = Estimator(delta=np.inf)


def runs(curvature=0.0, sd=0.0, seed=0):
    """Six sizes times five ratios of a law whose exponent of size shrinks with size."""
    size, ratio = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 5)
    rows = pd.DataFrame([{"parameters": n, "tokens": n * r} for n in size for r in ratio])
    noise = np.random.default_rng(seed).normal(0, sd, len(rows))
    return rows.assign(loss_nats=np.exp(truth(rows, curvature) + noise))


def truth(rows, curvature=0.0):
    u, v = np.log(rows["parameters"] / 1e8), np.log(rows["tokens"] / 3e9)
    return np.log(1.8 + 0.7 * np.exp(-0.34 * u + curvature * u**2) + 0.6 * np.exp(-0.3 * v))


def places():
    size, ratio = np.geomspace(2e7, 6e8, 7), np.geomspace(8, 120, 7)
    return pd.DataFrame([{"parameters": n, "tokens": n * r} for n in size for r in ratio])


def test_the_step_is_the_regression_on_slopes_and_products_of_logs():
    rows, at = runs(0.04, sd=0.004), places()
    fit = SQUARES.fit(rows, CHINCHILLA)
    result = shape_robust(fit).predict(at).log
    slopes, slopes_at = (numerical_slopes(fit, each) for each in (rows, at))
    u, v = (np.log(rows[name]) for name in ("parameters", "tokens"))
    s, t = (np.log(at[name]) for name in ("parameters", "tokens"))
    centre_u, centre_v = u.mean(), v.mean()
    columns = [(u - centre_u) ** 2, (u - centre_u) * (v - centre_v), (v - centre_v) ** 2]
    columns_at = [(s - centre_u) ** 2, (s - centre_u) * (t - centre_v), (t - centre_v) ** 2]
    whole = np.column_stack([slopes, *columns])
    answer = np.linalg.lstsq(whole, fit.residuals, rcond=None)[0]
    law = prediction_errors(fit, sandwich(fit), at).log
    wanted = law + np.column_stack([slopes_at, *columns_at]) @ answer
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-7)


def numerical_slopes(fit, rows):
    step, design = 1e-5, fit.form.design(rows)
    ends = [fit.theta + sign * step * np.eye(5) for sign in (1, -1)]
    up, down = (np.stack([log_loss(design, row[None])[0] for row in each], 1) for each in ends)
    return (up - down) / (2 * step)


def error_of(predicted, at, product=0.0, curvature=0.0):
    """Root mean square error of ln of the target."""
    return np.sqrt(np.mean((predicted - truth(at, curvature) - product * product_of(at)) ** 2))


def product_of(rows):
    return np.log(rows["parameters"] / 1e8) * np.log(rows["tokens"] / 3e9)


# What is left over of a product of logs, and of an exponent that shrinks (a third-order departure
# remains of it).
@pytest.mark.parametrize(("product", "curvature", "left"), [(0.005, 0.0, 0.15), (0.0, 0.04, 0.65)])
def test_a_law_of_another_shape_is_followed_between_its_points(product, curvature, left):
    rows, at = runs(curvature), places()
    rows = rows.assign(loss_nats=rows["loss_nats"] * np.exp(product * product_of(rows)))
    fit = SQUARES.fit(rows, CHINCHILLA)
    law = error_of(prediction_errors(fit, sandwich(fit), at).log, at, product, curvature)
    assert error_of(shape_robust(fit).predict(at).log, at, product, curvature) < left * law


def test_a_law_that_is_right_is_left_as_it_is():
    fit = SQUARES.fit(runs(), CHINCHILLA)
    np.testing.assert_allclose(
        shape_robust(fit).predict(places()).log, truth(places()), rtol=0, atol=1e-9
    )


def test_its_price_is_width():
    fit = SQUARES.fit(runs(sd=0.004), CHINCHILLA)
    narrow, wide = (
        prediction_errors(fit, sandwich(fit), places()).error,
        shape_robust(fit).predict(places()).error,
    )
    assert 1.0 < np.median(wide / narrow) < 2.0


def test_an_outlier_moves_nothing():
    rows = runs(sd=0.002)
    outlying = rows.assign(
        loss_nats=np.where(np.arange(len(rows)) == 13, 1.2, 1) * rows["loss_nats"]
    )
    good, bad = (
        shape_robust(Estimator().fit(each, CHINCHILLA)).predict(places()).log
        for each in (rows, outlying)
    )
    assert np.abs(good - bad).max() < 0.003


def test_inside_is_the_range_of_every_variable_and_of_their_ratio():
    result = shape_robust(SQUARES.fit(runs(sd=0.002), CHINCHILLA))
    # Within; too large; a ratio of 1e4 and one of 1 with sizes and tokens that were both run.
    at = pd.DataFrame({"parameters": [1e8, 2e9, 1e7, 9e8], "tokens": [2e9, 2e10, 1e11, 9e8]})
    assert result.inside(at).tolist() == [True, False, False, False]
    assert result.inside(runs()).all()


@pytest.mark.parametrize(("count", "known"), [(13, False), (14, True)])
def test_too_few_rows_have_no_shape_robust_interval(count, known):
    rows = runs(sd=0.002).sample(count, random_state=0).reset_index(drop=True)
    fit = SQUARES.fit(rows, CHINCHILLA)
    assert (shape_robust(fit) is not None) == known


def test_a_law_of_one_variable_has_one_too():
    rows = runs(0.04).query("tokens < 2e11").assign(flops=lambda r: 6 * r.parameters * r.tokens)
    assert shape_robust(SQUARES.fit(rows.reset_index(drop=True), POWER)) is not None
