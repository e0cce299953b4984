"""What the fit command answers beside parameters: budgets, leads and the three approaches."""

import numpy as np
import pandas as pd
import pytest

from analysis.fit.__main__ import main
from analysis.fit.questions import Budget, approaches, bootstrap, lead, spending
from analysis.fitting.estimator import Estimator
from analysis.laws.catalog import CHINCHILLA, nested_family
from analysis.tables.run_region import run_region
from tests.analysis.inference.test_scaling_law import runs


def arms(lead_of_b=0.03):
    """Two arms on one isoFLOP grid; b has the same floor and terms a little lower."""
    a, b = runs(1e-4).assign(architecture="a"), runs(1e-4).assign(architecture="b")
    b["loss_nats"] = 1.8 + (1 - lead_of_b) * (b["loss_nats"] - 1.8)
    both = pd.concat([a, b], ignore_index=True)
    return both.assign(run_id=[str(row) for row in range(len(both))])


@pytest.fixture(scope="module")
def fitted():
    return Estimator().fit(arms(), nested_family(("architecture",))["Mab"])


@pytest.fixture(scope="module")
def replicates(fitted):
    return bootstrap(fitted)


def test_a_lead_is_that_of_the_law_in_tokens_compute_and_parameters(fitted, replicates):
    lines = list(lead(fitted, replicates, "a"))
    assert [each.split(" times the ")[1].split(" of b")[0] for each in lines] == [
        "tokens", "training FLOPs", "parameters",
    ]  # fmt: skip
    assert all(each.startswith("a needs 1.") for each in lines)
    # L - E falls by 3 % everywhere, and with compute as C^-.175 (alpha beta / (alpha + beta)).
    factor = float(lines[1].split()[2])
    assert factor == pytest.approx(0.97 ** (-0.70 / (0.34 * 0.36)), rel=0.02)


def test_slower_tokens_turn_a_lead_in_compute_into_a_lag_in_seconds(fitted, replicates):
    rows = fitted.rows.assign(tokens_per_second=1e15 / fitted.rows["parameters"])
    slow_b = np.where(rows["architecture"] == "b", 0.5, 1.0)
    timed = Estimator().fit(
        rows.assign(tokens_per_second=slow_b * rows["tokens_per_second"]), fitted.law
    )
    lines = [each for each in lead(timed, replicates, "a") if "training seconds" in each]
    assert len(lines) == 1
    assert lines[0].startswith("a needs 0.5")


def test_an_unknown_baseline_names_the_arms(fitted, replicates):
    with pytest.raises(ValueError, match="'c' is not an arm; the arms are a, b"):
        list(lead(fitted, replicates, "c"))


def test_a_budget_goes_where_the_closed_form_says_and_serving_wants_smaller_models():
    fit = Estimator().fit(runs(1e-5), CHINCHILLA)
    lines = list(spending(fit, bootstrap(fit), Budget(5e19, served=1e12)))
    scale = (0.34 * 400 / (0.36 * 900)) ** (1 / 0.70)
    best = scale * (5e19 / 6) ** (0.36 / 0.70)
    assert lines[0].startswith("5e+19 FLOPs: ")
    assert float(lines[0].split()[2]) == pytest.approx(best / 1e9, rel=0.02)
    assert "1 T tokens served" in lines[1]
    served = lines[1].split("served: ")[1]
    size = float(served.split()[0]) * {"G": 1e9, "M": 1e6}[served.split()[1]]
    assert size < 0.6 * best
    values = lines[1].split(" loss ")[-1].split()[0], lines[0].split(" loss ")[-1].split()[0]
    assert values[0] == values[1]


def test_a_budget_far_beyond_the_data_is_doubted():
    fit = Estimator().fit(runs(1e-5).drop(columns="flops"), CHINCHILLA)
    replicates = bootstrap(fit)
    text = " ".join(spending(fit, replicates, Budget(5e22)))
    assert "counted as 6 N D" in text
    assert "R-EXTRAP" in text
    assert "W-EXTRAP" in " ".join(spending(fit, replicates, Budget(5e22, allow=True)))


def test_three_approaches_are_told_for_each_arm():
    lines = list(approaches(arms().assign(decayed=True), ("architecture",)))
    assert sum(each.startswith("a: approach") for each in lines) == 3
    assert sum(each.startswith("b: approach 3") for each in lines) == 1
    assert "R-UNDER" in next(each for each in lines if "approach 1" in each)


def test_in_a_design_of_budgets_what_lies_between_parabolas_was_run():
    arm = run_region(runs())
    budget = np.sqrt(1e18 * 1e20)
    size = 0.29 * (budget / 6) ** (0.36 / 0.70) * np.array([0.5, 1.0, 2.0])
    assert arm.was_run(size, budget / (6 * size)).all()
    assert not arm.was_run(size, np.array([2e11, 2e8, 1e12])).any()


def test_the_hull_holds_every_run_and_adds_none_to_a_grid():
    sizes, ratios = np.geomspace(1e7, 1e9, 4), np.geomspace(5, 200, 3)
    rows = pd.DataFrame([{"parameters": n, "tokens": n * r} for n in sizes for r in ratios])
    rows = rows.assign(flops=6 * rows["parameters"] * rows["tokens"])
    arm = run_region(rows)
    np.testing.assert_allclose(arm.fewest_tokens, 5 * sizes)
    np.testing.assert_allclose(arm.most_tokens, 200 * sizes)
    few = run_region(rows.drop(index=[2, 5]))  # the second size has lost its longest run
    assert few.was_run(sizes[1:2], 40 * sizes[1:2]).all()


def test_the_command_answers_in_one_call(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    arms().to_csv(file, index=False)
    words = [str(file), "--by", "architecture", "--baseline", "a", "--budget", "3e19"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "A [a]" in output
    assert "a: 3e+19 FLOPs: " in output
    assert "times the tokens of b" in output
    assert main([*words, "--law", "gamma"]) == 2
    assert "need --law chinchilla" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["arch", "architecture"])
def test_arms_are_named_by_the_files_own_column_or_the_schemas(tmp_path, capsys, name):
    file = tmp_path / "runs.csv"
    arms().rename(columns={"architecture": "arch"}).to_csv(file, index=False)
    assert main([str(file), "--by", name]) == 0
    assert "A [a]" in capsys.readouterr().out


def test_an_unknown_column_of_arms_is_one_line(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    arms().to_csv(file, index=False)
    assert main([str(file), "--by", "flavour"]) == 2
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "flavour" in each]
    assert "is no column that was read; there are architecture" in line


def test_no_value_is_cut_where_the_output_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    file = tmp_path / "runs.csv"
    rows = arms().assign(architecture=lambda t: "an architecture of a long name " + t.architecture)
    rows.to_csv(file, index=False)
    assert main([str(file), "--by", "architecture"]) == 0
    output = capsys.readouterr().out
    assert "\u2026" not in output
    assert "A [an architecture of a long name a]" in output
