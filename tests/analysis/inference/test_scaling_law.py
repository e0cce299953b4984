"""The estimator's form, the three approaches, and the command for tables of others."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from analysis.compute_optimal.three_approaches import all_three, envelope
from analysis.fit.__main__ import main
from analysis.fitting.estimator import Estimator
from analysis.inference.scaling_law import LAWS, ScalingLaw
from analysis.laws.catalog import RATE
from analysis.laws.multi_power import MULTI_POWER
from analysis.laws.task_error import TaskError
from analysis.laws.transformed import loss_to_loss
from analysis.validity.refusal import Refusal
from tests.oracles import fits as slow
from tests.oracles import laws as oracle

LAW = (1.8, 400.0, 0.34, 900.0, 0.36)


def runs(sd=0.003):
    """Five budgets of seven sizes, a run each."""
    budgets, steps = np.geomspace(1e18, 1e20, 5), np.geomspace(0.25, 4.0, 7)
    best = 0.29 * (budgets / 6) ** (0.36 / 0.70)
    rows = pd.DataFrame(
        [
            {"parameters": n * s, "tokens": c / (6 * n * s), "flops": c}
            for c, n in zip(budgets, best, strict=True)
            for s in steps
        ]
    )
    loss = slow.chinchilla(LAW, rows["parameters"], rows["tokens"])
    noise = np.random.default_rng(0).normal(0, sd, len(rows))
    return rows.assign(loss_nats=loss * np.exp(noise), run_id=[str(i) for i in range(len(rows))])


@pytest.fixture(scope="module")
def fitted():
    return ScalingLaw("chinchilla").fit(runs())


def test_a_constructor_stores_and_learns_nothing():
    law = ScalingLaw("gamma", delta=0.01)
    assert (law.law, law.delta) == ("gamma", 0.01)
    with pytest.raises(RuntimeError, match="call fit"):
        _ = law.learnt_


def test_what_was_learnt_cannot_be_changed(fitted):
    with pytest.raises(dataclasses.FrozenInstanceError):
        fitted.learnt_.backtest = None


def test_a_wider_level_gives_a_wider_interval_around_the_same_estimate(fitted):
    at = pd.DataFrame({"parameters": [2e8], "tokens": [5e9]})
    narrow, wide = fitted.predict(at, interval=0.5), fitted.predict(at, interval=0.99)
    assert wide["estimate"][0] == narrow["estimate"][0]
    assert wide["low"][0] < narrow["low"][0] < narrow["high"][0] < wide["high"][0]


def test_the_mean_of_runs_is_known_better_than_one_run_and_inside_the_data_alone(fitted):
    at = pd.DataFrame({"parameters": [2e8, 9.5e9], "tokens": [5e9, 2e9]})
    result = fitted.predict(at)
    assert result["low"][0] < result["mean_low"][0] < result["mean_high"][0] < result["high"][0]
    assert result["mean_low"].isna().tolist() == [False, True]
    truth = slow.chinchilla(LAW, at["parameters"], at["tokens"])
    assert result["mean_low"][0] < truth[0] < result["mean_high"][0]


def test_far_beyond_the_data_is_refused_unless_allowed(fitted):
    far = pd.DataFrame({"parameters": [1e11], "tokens": [2e12]})
    refused = fitted.predict(far)
    assert isinstance(refused, Refusal)
    assert refused.code == "R-EXTRAP"
    assert isinstance(fitted.predict(far, allow=True), pd.DataFrame)


def test_an_undetermined_table_is_refused_and_stays_refused():
    law = ScalingLaw().fit(runs().iloc[:6])
    at = pd.DataFrame({"parameters": [2e8], "tokens": [5e9]})
    assert isinstance(law.learnt_, Refusal)
    assert law.predict(at) is law.learnt_


def test_unknown_laws_and_parameters_are_named():
    with pytest.raises(ValueError, match="known laws: batch, chinchilla"):
        ScalingLaw("chinchila").fit(runs())
    with pytest.raises(ValueError, match="gamma cannot vary"):
        ScalingLaw(by=("run_id",), varies=frozenset({"gamma"})).fit(runs())


def test_the_three_approaches_agree_where_their_assumptions_hold():
    parabola, law = all_three(runs(1e-5))[1:]
    truth = 0.36 / 0.70
    assert parabola.parameters.estimate == pytest.approx(truth, abs=2e-3)
    assert law.parameters.estimate == pytest.approx(truth, abs=2e-3)
    assert not any(each.code == "W-A2BIAS" for each in parabola.warnings)


def test_a_wide_grid_warns_of_its_bias():
    rows = runs(1e-5)
    best = 0.29 * (rows["flops"] / 6) ** (0.36 / 0.70)
    wide = rows.assign(parameters=best * (rows["parameters"] / best) ** 2.5)
    wide["tokens"] = wide["flops"] / (6 * wide["parameters"])
    wide["loss_nats"] = slow.chinchilla(LAW, wide["parameters"], wide["tokens"])
    parabola = all_three(wide)[1]
    assert any(each.code == "W-A2BIAS" for each in parabola.warnings)


def test_the_envelope_follows_the_lowest_training_curve():
    sizes = np.geomspace(1e7, 1e9, 9)
    tokens = np.geomspace(1e8, 1e12, 60)
    rows = pd.DataFrame(
        [{"run_id": str(n), "parameters": n, "tokens": d, "flops": 6 * n * d} for n in sizes
         for d in tokens]
    )  # fmt: skip
    rows["loss_nats"] = slow.chinchilla(LAW, rows["parameters"], rows["tokens"])
    result = envelope(rows.assign(decayed=True))
    assert result.parameters.estimate == pytest.approx(0.36 / 0.70, abs=0.05)
    unfinished = envelope(rows.assign(decayed=False))
    assert any(each.code == "W-DECAY" for each in unfinished.warnings)


def recovered(law, formula, values, rows):
    """Fit a law to its own values with a little noise; the reported parameters."""
    target = np.array([formula(values, row) for row in rows.to_dict("records")])
    noise = np.random.default_rng(0).normal(0, 2e-4, len(rows))
    return Estimator().fit(rows.assign(**{law.target: target * np.exp(noise)}), law)


def test_rates_are_recovered_with_either_sign():
    values = {"c": 1.8, "p": -0.7, "q": 0.3}
    result = recovered(RATE, oracle.rate, values, runs())
    assert result.parameters == pytest.approx(values, rel=0.02)


def test_a_line_from_loss_to_loss_is_recovered():
    law = loss_to_loss("loss_nats", "other_loss")
    values = {"E": 1.1, "K": 0.9, "E_x": 1.6, "minus_k": -1.2}
    result = recovered(law, oracle.loss_to_loss, values, runs(0.0))
    expected = [oracle.loss_to_loss(values, row) for row in result.rows.to_dict("records")]
    np.testing.assert_allclose(result.predict(result.rows), expected, rtol=5e-4)
    assert result.parameters["minus_k"] == pytest.approx(-1.2, abs=0.1)


def test_a_tasks_error_is_recovered():
    values = {"ceiling": 0.85, "k": 4.0, "g": 1.1}
    result = recovered(TaskError(), oracle.task_error, values, runs(0.0))
    assert result.parameters == pytest.approx(values, rel=0.03)


def test_the_schedule_law_predicts_a_finished_decay_from_other_schedules():
    values = {"E": 2.6, "A": 0.6, "alpha": 0.5, "B": 300.0, "C": 2.0, "beta": 0.6, "gamma": 0.5}
    steps = np.arange(1, 121)
    constant = np.full(120, 3e-3)
    cosine = 1.5e-3 * (1 + np.cos(np.pi * steps / 120)) + 1e-5
    curves = [(rates, t) for rates in (constant, cosine) for t in range(20, 121, 4)]
    rows = pd.DataFrame({"rates": [rates[:t] for rates, t in curves]})
    result = recovered(MULTI_POWER, oracle.multi_power, values, rows)
    decayed = np.concatenate([np.full(80, 3e-3), np.linspace(3e-3, 1e-5, 40)])
    expected = oracle.multi_power(values, {"rates": decayed})
    cut = oracle.multi_power(values, {"rates": constant})
    predicted = result.predict(pd.DataFrame({"rates": [decayed]}))[0]
    assert abs(predicted - expected) < 0.1 * abs(cut - expected)


def test_the_command_fits_an_external_table_and_refuses_a_thin_one(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    table = runs().rename(columns={"parameters": "N", "tokens": "D", "loss_nats": "loss"})
    table.drop(columns="flops").to_csv(file, index=False)
    assert main([str(file), "--law", "chinchilla", "--at", "1e8,2e9"]) == 0
    output = capsys.readouterr().out
    assert "parameters: column 'N'" in output
    assert "starts agree" in output
    table.iloc[:5].to_csv(file, index=False)
    assert main([str(file)]) == 1
    assert "R-UNDER" in capsys.readouterr().out
    assert main([str(file), "--law", "nonsense"]) == 2
    assert "known laws" in capsys.readouterr().out


def test_the_command_compares_arms(tmp_path, capsys):
    rows = runs()
    both = pd.concat([rows.assign(architecture="a"), rows.assign(architecture="b")])
    file = tmp_path / "runs.csv"
    both.assign(run_id=both["architecture"] + both["run_id"]).to_csv(file, index=False)
    assert main([str(file), "--by", "architecture"]) == 0
    output = capsys.readouterr().out
    assert "Mfull" in output
    assert output.count("parameters: column") == 1


def test_the_command_compares_no_families_of_a_single_arm_and_reads_a_table_once(tmp_path, capsys):
    file, sets = tmp_path / "runs.csv", ("one", "two")
    rows = runs().assign(architecture="a")
    pd.concat([rows.assign(evaluation_set=name) for name in sets]).to_csv(file, index=False)
    assert main([str(file), "--by", "architecture"]) == 0
    output = capsys.readouterr().out
    assert "Mfull" not in output
    assert "W-EVAL" not in output
    assert output.count("parameters: column") == 1
    assert all(f"points on {name}" in output for name in sets)


def test_every_named_law_bears_its_key():
    assert all(law.name == name for name, law in LAWS.items())
