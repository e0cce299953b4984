"""Laws and their estimation: derivatives, optima, published tables, refusals, warnings."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.fitting.estimator import Estimator, Fit, fit
from analysis.fitting.solver import Problem, solve
from analysis.laws.bound import bind, log_loss, log_loss_and_jacobian
from analysis.laws.catalog import CHINCHILLA, POWER, nested_family
from analysis.tables.run_table import final
from analysis.validity.refusal import Refusal
from tests.oracles import fits as oracle

CELL = ("architecture", "corpus")


@pytest.fixture(scope="module")
def exact_rows(noise_free):
    rows = final(noise_free).rows
    return rows[rows["evaluation_set"] == "prose"]


@pytest.fixture(scope="module")
def one_cell(exact_rows):
    return exact_rows[(exact_rows["architecture"] == "mamba") & (exact_rows["corpus"] == "web")]


def with_noise(rows, sd, seed):
    noise = np.random.default_rng(seed).normal(0.0, sd, len(rows))
    return rows.assign(loss_nats=rows["loss_nats"] * np.exp(noise))


@pytest.mark.parametrize("law", [CHINCHILLA, POWER, *nested_family(CELL).values()])
def test_analytic_derivatives_equal_finite_differences(exact_rows, law):
    form = bind(law, exact_rows)
    design = form.design(exact_rows)
    theta = np.random.default_rng(5).normal(0.0, 0.5, len(form.labels))
    result = log_loss_and_jacobian(design, theta[None])[1][0]
    expected = oracle.derivative(lambda vector: log_loss(design, vector[None])[0], theta, 1e-6)
    np.testing.assert_allclose(result, expected, atol=1e-8)


def test_a_law_predicts_what_its_named_parameters_say(one_cell):
    result = fit(with_noise(one_cell, 0.003, 0), CHINCHILLA)
    names = ("E", "A", "alpha", "B", "beta")
    values = [result.parameters[name] for name in names]
    expected = oracle.chinchilla(values, one_cell["parameters"], one_cell["tokens"])
    np.testing.assert_allclose(result.predict(one_cell), expected, rtol=1e-10)


def test_pivots_are_the_terms_at_the_centre_of_the_data(one_cell):
    result = fit(with_noise(one_cell, 0.003, 0), CHINCHILLA)
    centre = np.exp(np.log(one_cell["parameters"]).mean())
    expected = result.parameters["A"] * centre ** -result.parameters["alpha"]
    assert result.pivots[""]["A"] == pytest.approx(expected, rel=1e-10)


def test_exponents_are_recovered_from_exact_losses(one_cell, study):
    result = fit(one_cell, CHINCHILLA)
    _, _, alpha, _, beta = study.law
    assert result.parameters["alpha"] == pytest.approx(alpha, abs=2e-4)
    assert result.parameters["beta"] == pytest.approx(beta, abs=2e-4)


def test_the_optimum_is_as_low_as_a_simplex_search_finds(one_cell):
    rows = with_noise(one_cell, 0.005, 1)
    result = Estimator(delta=2e-3).fit(rows, CHINCHILLA)
    starts = [(0.9, 30.0, 0.35, 60.0, 0.33), (0.3, 10.0, 0.2, 20.0, 0.2)]
    columns = [rows[name].to_numpy() for name in ("parameters", "tokens", "loss_nats")]
    reached = oracle.best_by_simplex(*columns, 2e-3, starts)
    assert result.objective <= reached * (1 + 1e-6)
    values = [result.parameters[name] for name in ("E", "A", "alpha", "B", "beta")]
    assert result.objective == pytest.approx(oracle.huber_sum(values, *columns, 2e-3), rel=1e-9)


def test_the_batched_solver_alone_reaches_the_polished_optimum(one_cell):
    rows = with_noise(one_cell, 0.005, 8)
    result = Estimator(delta=2e-3).fit(rows, CHINCHILLA)
    near = result.theta + np.random.default_rng(0).normal(0.0, 0.02, (20, len(result.theta)))
    design, y = result.form.design(rows), np.log(rows["loss_nats"].to_numpy())
    _, reached = solve(Problem(design, y, np.ones(len(y)), 2e-3), near, 1e-11)
    np.testing.assert_allclose(reached, result.objective, rtol=1e-6)


def test_published_points_give_the_published_optimum(chinchilla_rows):
    result = Estimator(delta=1e-3).fit(chinchilla_rows, CHINCHILLA)
    assert len(chinchilla_rows) == 240
    assert result.objective == pytest.approx(0.0010182740346, rel=1e-7)
    assert result.parameters["alpha"] == pytest.approx(0.34731, abs=5e-4)
    assert result.parameters["beta"] == pytest.approx(0.36718, abs=5e-4)
    assert result.parameters["E"] == pytest.approx(1.8172, abs=1e-3)
    assert result.starts_agreeing >= 3


def test_published_points_give_the_known_least_squares_fit(chinchilla_rows):
    result = Estimator(delta=np.inf).fit(chinchilla_rows, CHINCHILLA)
    assert result.parameters["E"] == pytest.approx(1.8646, abs=1e-3)
    assert result.parameters["A"] == pytest.approx(593.32, rel=5e-3)
    assert result.parameters["B"] == pytest.approx(4875.6, rel=1e-2)
    assert result.parameters["alpha"] == pytest.approx(0.3603, abs=5e-4)
    assert result.parameters["beta"] == pytest.approx(0.4059, abs=5e-4)


def test_a_fit_does_not_depend_on_units_or_row_order(one_cell):
    rows = with_noise(one_cell, 0.004, 2)
    scaled = rows.assign(tokens=rows["tokens"] / 1e9, parameters=rows["parameters"] / 1e6)
    shuffled = scaled.sample(frac=1.0, random_state=0).reset_index(drop=True)
    first, second = fit(rows, CHINCHILLA), fit(shuffled, CHINCHILLA)
    assert second.objective == pytest.approx(first.objective, rel=1e-9)
    for name in ("alpha", "beta", "E"):
        assert second.parameters[name] == pytest.approx(first.parameters[name], rel=1e-5)


def test_huber_shrugs_off_an_outlier_that_moves_least_squares(one_cell, study):
    rows = with_noise(one_cell, 1e-4, 3).reset_index(drop=True)
    rows.loc[4, "loss_nats"] *= 1.1
    alpha = study.law[2]
    robust = fit(rows, CHINCHILLA).parameters["alpha"]
    squares = Estimator(delta=np.inf).fit(rows, CHINCHILLA).parameters["alpha"]
    assert abs(robust - alpha) < 0.02 < abs(squares - alpha)


def test_larger_laws_of_the_family_never_fit_worse(exact_rows):
    rows = with_noise(exact_rows, 0.003, 4)
    laws = nested_family(CELL)
    reached = {name: Estimator(delta=np.inf).fit(rows, law).objective for name, law in laws.items()}
    for small, large in (
        ("M0", "Ma"), ("M0", "Mb"), ("Ma", "Mab"), ("Mb", "Mab"), ("M0", "Me"), ("Me", "Meab"),
        ("Mab", "Meab"), ("Meab", "Mfull"),
    ):  # fmt: skip
        assert reached[large] <= reached[small] * (1 + 1e-9)


def test_separate_laws_equal_the_law_with_nothing_shared(exact_rows):
    rows = with_noise(exact_rows, 0.003, 5)
    together = Estimator(delta=0.004).fit(rows, nested_family(CELL)["Mfull"])
    apart = [
        Estimator(delta=0.004).fit(part, CHINCHILLA).objective
        for _, part in rows.groupby(list(CELL))
    ]
    assert together.objective == pytest.approx(sum(apart), rel=1e-5)


def test_too_few_runs_are_refused(one_cell):
    result = fit(one_cell.iloc[:7], CHINCHILLA)
    assert isinstance(result, Refusal)
    assert result.code == "R-UNDER"
    assert isinstance(fit(one_cell.iloc[:0], CHINCHILLA), Refusal)


def test_two_horizons_are_refused(exact_rows):
    result = fit(exact_rows[exact_rows["tokens"] < 1e6], CHINCHILLA)
    assert isinstance(result, Refusal)
    assert "distinct values of tokens" in result.reason


def test_a_refusal_names_the_arm_that_is_too_thin(exact_rows):
    thin = exact_rows[exact_rows["parameters"] == exact_rows["parameters"].min()]
    both = pd.concat([exact_rows.assign(arm="whole"), thin.assign(arm="thin")])
    apart = replace(CHINCHILLA, by=("arm",), varies=frozenset(CHINCHILLA.parameters))
    result = fit(both.reset_index(drop=True), apart)
    assert isinstance(result, Refusal)
    assert "thin" in result.reason
    assert "leave this arm out" in result.remedy


def test_a_plain_ladder_is_refused_for_chinchilla_and_fitted_by_a_power_law():
    sizes = np.geomspace(1e4, 1e7, 12)
    ladder = pd.DataFrame(
        {
            "parameters": sizes,
            "tokens": 20 * sizes,
            "flops": 120 * sizes**2,
            "loss_nats": 1.0 + 50 * (120 * sizes**2) ** -0.17,
        }
    )
    refused = fit(ladder, CHINCHILLA)
    assert isinstance(refused, Refusal)
    assert "tokens per parameter" in refused.reason
    result = fit(ladder, POWER)
    assert isinstance(result, Fit)
    assert result.parameters["gamma"] == pytest.approx(0.17, abs=1e-3)


def test_the_default_design_is_not_refused(one_cell):
    assert isinstance(fit(one_cell.iloc[:15], CHINCHILLA), Fit)


def test_a_law_without_a_floor_raises_the_floor_warning(one_cell):
    rows = one_cell.assign(
        loss_nats=8 * one_cell["parameters"] ** -0.1 + 9 * one_cell["tokens"] ** -0.12
    )
    assert "W-E0" in fit(with_noise(rows, 0.003, 6), CHINCHILLA).codes


def test_a_well_identified_floor_raises_no_floor_warning(chinchilla_rows):
    assert "W-E0" not in fit(chinchilla_rows, CHINCHILLA).codes


def test_a_narrow_design_raises_the_condition_warning(one_cell):
    narrow = one_cell[one_cell["parameters"] < 4e4]
    assert "W-COND" in fit(with_noise(narrow, 0.003, 7), CHINCHILLA).codes


def test_a_well_conditioned_design_raises_no_condition_warning(chinchilla_rows):
    result = fit(chinchilla_rows, CHINCHILLA)
    assert "W-COND" not in result.codes
    assert result.condition < 1e3


@pytest.mark.parametrize(("starts", "warned"), [(1, True), (2, False)])
def test_too_few_starts_at_the_optimum_are_raised(chinchilla_rows, starts, warned):
    result = Estimator(starts=starts).fit(chinchilla_rows, CHINCHILLA)
    assert result.starts_agreeing == result.starts >= starts
    assert ("W-OPT" in result.codes) == warned
