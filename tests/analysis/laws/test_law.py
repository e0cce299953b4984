"""Laws: equal to their papers' formulas, with exact derivatives, invertible in their parameters."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.laws.bound import bind, log_loss, log_loss_and_jacobian
from analysis.laws.catalog import (
    BATCH,
    CHINCHILLA,
    GADRE,
    GAMMA,
    KAPLAN,
    POWER,
    RATE,
    nested_family,
)
from analysis.laws.multi_power import MULTI_POWER
from analysis.laws.task_error import TaskError
from analysis.laws.transformed import REPEAT, loss_to_loss
from tests.analysis.parameters import theta_of
from tests.oracles import fits as slow
from tests.oracles import laws as oracle

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
CASES = {
    "chinchilla": (CHINCHILLA, oracle.chinchilla, TRUTH),
    "power": (POWER, oracle.power, {"E": 1.7, "K": 300.0, "gamma": 0.12}),
    "gamma": (GAMMA, oracle.gamma, {**TRUTH, "power": 0.7}),
    "kaplan": (KAPLAN, oracle.kaplan, {"E": 1.5, "A": 2e4, "alpha": 0.8, "B": 1e6, "power": 0.3}),
    "gadre": (GADRE, oracle.gadre, {"E": 1.8, "P": 700.0, "Q": 2000.0, "h": 0.17}),
    "rate": (RATE, oracle.rate, {"c": 1.8, "p": -0.7, "q": 0.3}),
    "batch": (BATCH, oracle.batch, {"c": 0.6, "r": 0.57}),
    "repeat": (REPEAT, oracle.repeat, {**TRUTH, "R_D": 15.0, "R_N": 5.0}),
    "loss to loss": (
        loss_to_loss("loss_nats", "other_loss"),
        oracle.loss_to_loss,
        {"E": 1.1, "K": 0.9, "E_x": 1.6, "minus_k": -1.2},
    ),
    "task error": (TaskError(), oracle.task_error, {"ceiling": 0.85, "k": 2.0, "g": 0.8}),
    "multi power": (
        MULTI_POWER,
        oracle.multi_power,
        {"E": 2.6, "A": 0.6, "alpha": 0.5, "B": 300.0, "C": 2.0, "beta": 0.6, "gamma": 0.5},
    ),
}


@pytest.fixture(scope="module")
def table():
    generator = np.random.default_rng(3)
    sizes, tokens = (10 ** generator.uniform(low, low + 2, 30) for low in (7.5, 9.0))
    rows = pd.DataFrame({"parameters": sizes, "tokens": tokens, "flops": 6 * sizes * tokens})
    rows["unique_tokens"] = tokens / generator.uniform(1.0, 30.0, 30)
    rows["loss_nats"] = [oracle.chinchilla(TRUTH, row) for row in rows.to_dict("records")]
    rows["rates"] = [schedule(int(steps)) for steps in generator.integers(20, 60, 30)]
    return rows


def schedule(steps):
    """Constant, then a linear decay of the last third: one rate per step."""
    kept = 2 * steps // 3
    return np.concatenate([np.full(kept, 3e-3), np.linspace(3e-3, 1e-4, steps - kept)])


@pytest.mark.parametrize("name", CASES)
def test_a_law_is_its_papers_formula(table, name):
    law, formula, values = CASES[name]
    form = bind(law, table)
    result = log_loss(form.design(table), theta_of(form, values)[None])[0]
    expected = [math.log(formula(values, row)) for row in table.to_dict("records")]
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_exact(table, name):
    law, _, values = CASES[name]
    form = bind(law, table)
    theta, design = theta_of(form, values), form.design(table)
    result = log_loss_and_jacobian(design, theta[None])[1][0]
    expected = slow.derivative(lambda vector: log_loss(design, vector[None])[0], theta, 1e-5)
    assert np.abs(result - expected).max() <= 1e-7 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_parameters_survive_the_way_into_fitted_coordinates_and_back(table, name):
    law, _, values = CASES[name]
    form = bind(law, table)
    back = form.natural(theta_of(form, values), "")
    reported = {n: float(np.exp(v) if n in law.logs else v) for n, v in back.items()}
    assert reported == pytest.approx(values, rel=1e-9)


def test_a_parameter_that_varies_moves_its_own_group_only(table):
    law = replace(nested_family(("kind",))["Mab"], by=("kind",))
    rows = table.assign(kind=["a", "b"] * 15)
    form = bind(law, rows)
    theta = np.zeros((2, len(form.labels)))
    theta[1, form.slots["A", "b"]] = 0.1
    first, second = log_loss(form.design(rows), theta)
    moved = first != second
    assert (moved == (rows["kind"] == "b")).all()


def test_given_parameters_leave_only_the_rest_to_be_fitted(table):
    form = bind(replace(REPEAT, fixed=tuple(TRUTH.items())), table)
    assert form.labels == ("R_D", "R_N")


def test_repetition_keeps_its_digits_at_huge_rates(table):
    form = bind(replace(REPEAT, fixed=tuple(TRUTH.items())), table)
    design = form.design(table)
    result = log_loss(design, theta_of(form, {"R_D": 1e16, "R_N": 1e16})[None])[0]
    np.testing.assert_allclose(result, np.log(table["loss_nats"]), rtol=1e-9)


def test_a_row_of_an_unknown_group_is_refused(table):
    form = bind(nested_family(("kind",))["Mab"], table.assign(kind="a"))
    with pytest.raises(ValueError, match="a row is of b"):
        form.design(table.assign(kind="b"))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_few_rows_of_several_groups_are_predicted_as_among_all(table, name, count):
    law, _, values = CASES[name]
    rows = table.assign(kind=["a", "b"] * 15)
    form = bind(replace(law, by=("kind",)), rows)
    theta = theta_of(form, values)[None]
    few = rows.iloc[:count]
    together = log_loss(form.design(rows), theta)[0][:count]
    np.testing.assert_array_equal(log_loss(form.design(few), theta)[0], together)
