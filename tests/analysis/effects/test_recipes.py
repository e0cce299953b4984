"""What recipes change: paired by seed, with intervals that hold what was put in."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from analysis.effects.recipes import recipe_effects
from analysis.figures.recipe_figures import draw_recipes
from analysis.report.write import redraw
from analysis.tables.frames import floats, where
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from tests.analysis.synthetic_study import Study, write

ARMS = ("transformer", "transformer muon", "transformer lion")
RECIPES = {"transformer muon": "transformer", "transformer lion": "transformer"}
EFFECT = -0.04
"""On ln L, once for the second arm and twice for the third."""


def study_of(root, generator, seeds=(0, 1, 2)):
    study = Study(
        architectures=ARMS,
        corpora=("web",),
        sizes={"r30k": 3e4},
        horizons=(4.5e5, 9e5),
        seeds={"r30k": seeds},
        architecture_effect=EFFECT,
    )
    write(study, root, generator)
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    (root / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "recipes": RECIPES}))
    return root


def by_hand(table, horizon):
    """Differences of ln loss, seed by seed, of each recipe."""
    rows = where(where(final(table).rows, "evaluation_set", "prose"), "horizon_tokens", horizon)
    losses = {
        arm: floats(where(rows, "architecture", arm).sort_values("seed"), "loss_nats")
        for arm in ARMS
    }
    return {arm: np.log(losses[arm] / losses["transformer"]) for arm in RECIPES}


def test_a_recipe_is_compared_seed_by_seed(tmp_path):
    table = load(study_of(tmp_path / "study", np.random.default_rng(0)))
    effects = recipe_effects(table)
    assert len(effects) == 2 * 2
    for horizon in (4.5e5, 9e5):
        differences = by_hand(table, horizon)
        spread = np.sqrt(np.mean([np.var(each, ddof=1) for each in differences.values()]))
        half = stats.t.ppf(0.975, 4) * spread / np.sqrt(3)
        for arm, each in differences.items():
            (row,) = where(
                where(effects, "recipe", arm.split()[1]), "horizon_tokens", horizon
            ).to_dict("records")
            assert row["architecture"] == "transformer"
            assert row["seeds"] == 3
            assert row["degrees_of_freedom"] == 4
            wanted = 100 * np.expm1(each.mean() + half * np.array([-1, 0, 1]))
            assert [row["low"], row["percent"], row["high"]] == pytest.approx(wanted, rel=1e-3)


def test_intervals_hold_the_true_change_about_as_often_as_they_say(tmp_path):
    table, draw = (
        load(study_of(tmp_path / "study", np.random.default_rng(0))),
        np.random.default_rng(1),
    )
    truth = {arm: EFFECT * place for place, arm in enumerate(ARMS)}
    effect = np.array([truth[arm] for arm in table.rows["architecture"]])
    seeds = table.rows["seed"].to_numpy(dtype=int)
    held = []
    for _ in range(60):
        # What the arms of a seed share goes out of their difference.
        noise = draw.normal(0, 0.05, 3)[seeds] + draw.normal(0, 0.003, len(effect))
        drawn = replace(table, rows=table.rows.assign(loss_nats=np.exp(effect + noise)))
        for row in recipe_effects(drawn).to_dict("records"):
            true = 100 * np.expm1(truth[f"transformer {row['recipe']}"])
            held.append(row["low"] <= true <= row["high"])
    assert 0.9 <= np.mean(held) <= 0.99


def test_one_seed_gives_no_interval(tmp_path):
    effects = recipe_effects(load(study_of(tmp_path / "study", np.random.default_rng(0), (0,))))
    assert np.isnan(floats(effects, "low")).all()
    (plate,) = draw_recipes(effects, "prose")
    assert "so no intervals" in plate.caption
    assert "one seed" in plate.title


def test_a_sweep_without_recipes_has_no_such_section(tmp_path):
    root = study_of(tmp_path / "study", np.random.default_rng(0))
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    (root / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "recipes": {}}))
    assert not len(recipe_effects(load(root)))
    assert draw_recipes(recipe_effects(load(root)), "prose") == []


def test_the_report_draws_what_recipes_change(tmp_path):
    root = study_of(tmp_path / "study", np.random.default_rng(0))
    redraw(root)
    figures = {path.stem for path in (root / "report").rglob("*.png")}
    assert "recipes" in figures
    page = (root / "report" / "index.html").read_text()
    assert "2 of 2 recipes change the loss by more than the seed noise" in page
