"""A search over learning rates: optima, brackets, sensitivity, and nothing said of arms."""

import json
import math

import numpy as np
import pytest
import yaml

from analysis.effects.learning_rates import rate_search, search_table, trials
from analysis.report.write import redraw
from analysis.study.study import Settings, analyse
from analysis.tables.run_table import has_evidence
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from analysis.words.learning_rates import tuning_sentence
from tests.analysis.synthetic_study import Study, write

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
RULE, FLOOR, CURVATURE = 0.004, 2.0, 0.1
# log2 of the best factor of each arm; the last one lies outside of what is tried.
OPTIMA = {"transformer": 0.3, "mamba": -0.8, "hybrid": 3.0}


def searched(root, state=None, listed=True):
    """A sweep whose seeds stand for learning rates, with a parabola in log2 of the rate."""
    study = Study(
        architectures=tuple(OPTIMA),
        corpora=("web",),
        sizes={"r30k": 3e4},
        horizons=(9e5,),
        seeds={"r30k": tuple(range(len(FACTORS)))},
        state=state or {},
    )
    write(study, root, np.random.default_rng(0))
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    if listed:
        ladders = {"default": {"learning_rate_factors": list(FACTORS)}}
        sweep |= {"config": {"ladder": "default", "ladders": ladders}}
        (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    for run_id in sweep["runs"]:
        if (root / run_id / "config.yaml").exists():
            _as_trial(root / run_id)
    return root


def _as_trial(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    factor, optimum = FACTORS[config["seed"]], OPTIMA[config["architecture"]]
    config |= {"seed": 0, "model": {"vocab_size": 257}}
    # The architecture's own scale is part of the rate that was used.
    config["optimizer"] |= {"learning_rate": RULE * factor / 2, "learning_rate_scale": 2.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    loss = FLOOR + CURVATURE * (math.log2(factor) - optimum) ** 2
    file = run / "evaluations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [{**row, "total_nats": loss * row["targets"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return load(searched(tmp_path_factory.mktemp("runs") / "search"))


def of(result, name):
    return result[result["architecture"] == name].iloc[0]


def test_the_parabola_finds_the_true_optimum(table):
    result = search_table(table)
    for name, factor in (("transformer", 1.0), ("mamba", 0.5)):
        row = of(result, name)
        assert row["optimum"] == "interior"
        np.testing.assert_allclose(row["factor"], factor)
        np.testing.assert_allclose(row["refined_log2"], math.log2(RULE) + OPTIMA[name])
        np.testing.assert_allclose(row["refined_factor"], 2.0 ** OPTIMA[name])


def test_an_optimum_at_the_edge_is_not_bracketed(table):
    row = of(search_table(table), "hybrid")
    assert row["optimum"] == "not bracketed"
    assert row["factor"] == 4.0
    assert np.isnan(row["refined_log2"])


def test_sensitivity_is_the_mean_excess_over_the_best_trial(table):
    losses = FLOOR + CURVATURE * (np.log2(FACTORS) - OPTIMA["transformer"]) ** 2
    row = of(search_table(table), "transformer")
    np.testing.assert_allclose(row["sensitivity_nats"], losses.mean() - losses.min())


def test_a_diverged_trial_counts_as_a_uniform_guess_and_brackets_the_optimum(tmp_path):
    result = search_table(load(searched(tmp_path / "diverged", state={14: "diverged"})))
    losses = FLOOR + CURVATURE * (np.log2(FACTORS) - OPTIMA["hybrid"]) ** 2
    losses[-1] = math.log(257)
    row = of(result, "hybrid")
    assert (row["trials"], row["diverged"], row["optimum"]) == (5, 1, "interior")
    np.testing.assert_allclose(row["sensitivity_nats"], losses.mean() - losses.min())
    assert np.isnan(row["refined_log2"])


def test_a_cell_with_a_trial_missing_has_no_verdict(tmp_path):
    result = search_table(load(searched(tmp_path / "partial", state={0: "running"})))
    row = of(result, "transformer")
    assert (row["trials"], row["optimum"]) == (4, "trials missing")
    assert np.isnan(row["factor"])
    assert of(result, "mamba")["optimum"] == "interior"


def test_the_middle_rate_is_the_rule_where_no_factors_are_listed(tmp_path):
    result = search_table(load(searched(tmp_path / "bare", listed=False)))
    np.testing.assert_allclose(of(result, "mamba")["factor"], 0.5)


def test_rates_carry_the_scale_of_their_architecture(table):
    np.testing.assert_allclose(
        np.unique(trials(table)["learning_rate"]), RULE * np.array(FACTORS), rtol=1e-12
    )


def test_a_search_answers_nothing_about_architectures(table):
    study = analyse(table, Settings(replicates=10))
    result = [*study.answer.corpus, *study.answer.architecture, study.joint.fit]
    assert all(isinstance(each, Refusal) and each.code == "R-TUNING" for each in result)
    assert not study.cells
    assert len(study.points.rows)


def test_a_search_is_known_as_one_before_its_second_rate_has_ended(tmp_path):
    state = dict.fromkeys(range(1, 15), "not started")
    assert rate_search(load(searched(tmp_path / "early", state=state))) is not None


def test_a_sweep_at_one_rate_is_no_search(sweep):
    assert rate_search(load(sweep)) is None


def test_the_report_of_a_search_shows_rates_and_no_effect(tmp_path):
    root = searched(tmp_path / "page")
    report = redraw(root)
    page, folder = report.page.read_text(), report.page.parent
    assert "<h2>Learning rates</h2>" in page
    assert "R-TUNING" in page
    assert "Architectures side by side" not in page
    assert {file.stem for file in (folder / "figures").iterdir()} == {"learning_rates"}
    assert (folder / "tables" / "rates.csv").exists()
    assert "mamba: r30k 0.5" in report.text()
    assert "hybrid: r30k 4 (not bracketed)" in report.text()
    assert "Equal tuning: 5 trials in each cell of every arm." in report.text()


@pytest.mark.parametrize("ended", [0, 1, 7])
def test_a_search_that_has_just_begun_gives_a_page(tmp_path, ended):
    state = dict.fromkeys(range(ended, 15), "not started")
    assert "R-TUNING" in redraw(searched(tmp_path / "begun", state=state)).page.read_text()


@pytest.mark.parametrize(
    ("scales", "evidence", "words"),
    [
        ((1.0, 1.0), ("searched", ""), "Warning: tuning is unequal. No evidence is stated for b"),
        ((1.0, 2.0), ("", ""), "Warning: the arms differ"),
        ((1.0, 1.0), ("", ""), "No arm was tuned"),
        ((1.0, 2.0), ("searched", "searched"), "Every arm"),
    ],
)
def test_the_ledger_warns_of_unequal_tuning(scales, evidence, words):
    entries = zip("ab", scales, evidence, strict=True)
    tuning = {name: {"learning_rate_scale": s, "evidence": e} for name, s, e in entries}
    assert tuning_sentence(tuning).startswith(words)


@pytest.mark.parametrize("stated", ["", "none", "None.", " n/a", "-", "?", "TODO", None])
def test_words_for_nothing_are_no_evidence(stated):
    assert not has_evidence({"evidence": stated})
    assert "No arm was tuned" in tuning_sentence({"a": {"evidence": stated}})


def test_a_search_is_evidence():
    assert has_evidence({"evidence": "sweeps/learning_rate.yaml, rungs 10k and 31k"})
