"""Cluster-robust intervals: the papers' matrices, and what clusters and weights do to them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.estimator import Estimator
from analysis.inference.cluster_robust import (
    cluster_index,
    parameter_interval,
    prediction_errors,
    sandwich,
)
from analysis.laws.bound import log_loss_and_jacobian
from analysis.laws.catalog import CHINCHILLA
from tests.oracles import fits as slow
from tests.oracles import robust as oracle


@pytest.fixture(scope="module")
def rows():
    sizes, ratios = np.geomspace(1e7, 1e9, 6), np.geomspace(5, 200, 4)
    points = [
        {"parameters": n, "tokens": n * r, "trunk_id": f"{n:.0f} {seed}"}
        for n in sizes
        for r in ratios
        for seed in range(2)
    ]
    rows = pd.DataFrame(points)
    generator = np.random.default_rng(0)
    shared = dict(zip(rows["trunk_id"].unique(), generator.normal(0, 0.004, 12), strict=True))
    noise = rows["trunk_id"].map(shared) + generator.normal(0, 0.002, len(rows))
    loss = slow.chinchilla((1.8, 400.0, 0.34, 900.0, 0.36), rows["parameters"], rows["tokens"])
    return rows.assign(loss_nats=loss * np.exp(noise))


@pytest.fixture(scope="module")
def squares(rows):
    return Estimator(delta=np.inf).fit(rows, CHINCHILLA)


@pytest.mark.parametrize("label", ["alpha", "beta", "E"])
def test_error_and_freedom_are_those_of_the_dense_matrices(rows, squares, label):
    slot = squares.form.labels.index(label)
    direction = np.eye(5)[slot]
    result = sandwich(squares)
    design = log_loss_and_jacobian(squares.form.design(rows), squares.theta[None])[1][0]
    clusters = cluster_index(rows)
    error, freedom = result.error_and_freedom(direction[None])
    variance = oracle.cr2(design, squares.residuals, clusters, direction)
    assert error[0] ** 2 == pytest.approx(variance, rel=1e-6)
    expected = oracle.freedom(design, clusters, direction, result.shared, result.own)
    assert freedom[0] == pytest.approx(expected, rel=1e-6)


def test_points_that_share_their_luck_widen_the_interval(rows, squares):
    apart = replace(squares, rows=rows.drop(columns="trunk_id"))
    together = parameter_interval(squares, sandwich(squares), "alpha")
    alone = parameter_interval(apart, sandwich(apart), "alpha")
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_a_prediction_is_surest_inside_the_data(rows, squares):
    places = pd.DataFrame({"parameters": [1e8, 1e12], "tokens": [3e9, 3e13]})
    error = prediction_errors(squares, sandwich(squares), places).error
    assert error[1] > 3 * error[0]


def test_a_row_that_counts_twice_gives_the_fit_of_a_row_written_twice(rows):
    weights = np.ones(len(rows))
    weights[::3] = 2.0
    doubled = pd.concat([rows, rows.iloc[::3]], ignore_index=True)
    first = Estimator().fit(rows, CHINCHILLA, weights)
    second = Estimator().fit(doubled, CHINCHILLA)
    assert first.objective == pytest.approx(second.objective, rel=1e-6)
    np.testing.assert_allclose(
        list(first.parameters.values()), list(second.parameters.values()), rtol=1e-4
    )
