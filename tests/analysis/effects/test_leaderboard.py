"""Arms side by side: intervals from pooled seeds, the lines to beat, what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.effects.leaderboard import compare_arms, pooled_sd, verdict
from analysis.inference.intervals import Interval
from analysis.report.write import redraw
from analysis.tables.sweep_folder import load
from analysis.words.leaderboard import arm_lines, caption
from tests.analysis.synthetic_study import Study, write

ARMS = ("transformer", "mamba", "hybrid", "identity")
STUDY = Study(
    architectures=ARMS,
    corpora=("web",),
    sizes={"r30k": 3e4},
    horizons=(9e5,),
    seeds={"r30k": (0, 1, 2)},
    architecture_effect=0.1,
)


def lines_beside(root, bigram, targets=200_000):
    """Write the files that the launcher puts beside the runs."""
    rows = [
        {
            "corpus": "web",
            "evaluation_set": "prose",
            "order": order,
            "tokens": 9e5,
            "total_nats": loss * targets,
            "targets": targets,
        }
        for order, loss in ((2, bigram), (5, 0.5 * bigram))
    ]
    (root / "baselines.json").write_text(json.dumps({"rows": rows}))
    ladder = [
        {"architecture": name, "rung": "r30k", "seq_len": context, "state_bytes": 10 * context}
        for name in ARMS
        for context in (256, 1_024, 8_192, 65_536)
    ]
    pd.DataFrame(ladder).to_parquet(root / "ladder.parquet")
    tuning = {name: {"learning_rate_scale": 1.0, "evidence": "searched"} for name in ARMS}
    tuning["identity"]["evidence"] = ""
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    (root / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "tuning": tuning}))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "arms"
    # Between the second and the third arm: far from both by the seeds' standard deviation.
    bigram = STUDY.loss(3e4, 9e5) * np.exp(0.15)
    return lines_beside(write(STUDY, folder, np.random.default_rng(5)), bigram)


@pytest.fixture(scope="module")
def comparison(root):
    (only,) = compare_arms(load(root))
    return only


def test_arms_are_sorted_by_loss_with_all_their_seeds(comparison):
    assert [arm.architecture for arm in comparison.arms] == list(ARMS)
    assert [len(arm.seeds) for arm in comparison.arms] == [3, 3, 3, 3]


def test_the_interval_is_that_of_an_analysis_of_variance(comparison):
    seeds = np.stack([arm.seeds for arm in comparison.arms])
    variance = np.mean(np.var(seeds, axis=1, ddof=1))
    half = stats.t.ppf(0.975, 8) * np.sqrt(variance / 3)
    for arm in comparison.arms:
        np.testing.assert_allclose(arm.loss.high - arm.loss.estimate, half, rtol=1e-12)
        np.testing.assert_allclose(arm.loss.estimate - arm.loss.low, half, rtol=1e-12)
    assert comparison.freedom == 8
    assert "8 pooled degrees of freedom" in caption(comparison)


def test_a_line_that_is_trained_adds_its_own_seed_noise(comparison):
    first = comparison.arms[0]
    widths = {name: each.high - each.low for name, each in first.against.items()}
    np.testing.assert_allclose(widths["identity"], np.sqrt(2) * widths["bigram"], rtol=1e-12)


def test_arms_beat_the_lines_that_they_truly_beat(comparison):
    result = {
        arm.architecture: {name: verdict(each) for name, each in arm.against.items()}
        for arm in comparison.arms
    }
    assert [result[name]["bigram"] for name in ARMS[:2]] == ["beats", "beats"]
    assert result["hybrid"] == {
        "identity": "beats",
        "bigram": "does not beat, is worse",
        "5-gram": "does not beat, is worse",
    }
    assert "identity" not in result["identity"]


def test_a_difference_within_the_noise_is_no_win():
    assert verdict(Interval(-0.1, -0.3, 0.1, "")) == "does not beat"
    assert verdict(Interval(-0.1, np.nan, np.nan, "")) == ""


def test_the_pooled_deviation_of_unequal_arms_weighs_them_by_their_freedom():
    sd, freedom = pooled_sd({"a": np.array([0.0, 2.0]), "b": np.array([1.0]), "c": np.zeros(4)})
    assert freedom == 4
    np.testing.assert_allclose(sd, np.sqrt(2.0 / 4))


def test_pooled_intervals_cover_the_truth_in_19_of_20_studies():
    generator, hits = np.random.default_rng(1), []
    for _ in range(2000):
        seeds = {str(arm): generator.normal(size=2) for arm in range(4)}
        sd, freedom = pooled_sd(seeds)
        half = stats.t.ppf(0.975, freedom) * sd / np.sqrt(2)
        hits.append(abs(seeds["0"].mean()) < half)
    assert 0.93 < np.mean(hits) < 0.97


def test_costs_come_from_the_record_and_the_ladder(comparison):
    arm = comparison.arms[0]
    np.testing.assert_allclose(arm.training_flops_per_token, 7.5 * 3e4)
    assert arm.tokens_per_second == 1e5
    assert arm.state_bytes == {1_024: 10_240, 8_192: 81_920, 65_536: 655_360}


def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    study = replace(STUDY, seeds={})
    root = lines_beside(write(study, tmp_path / "one", np.random.default_rng(0)), 3.0)
    (result,) = compare_arms(load(root))
    assert all(np.isnan(arm.loss.low) for arm in result.arms)
    assert "one seed per arm" in caption(result)
    assert "no interval" in arm_lines((result,))[0]
    assert "95 % interval" not in caption(result)


def test_ngrams_measured_on_other_targets_are_not_shown(tmp_path, root):
    other = write(STUDY, tmp_path / "other", np.random.default_rng(0))
    (result,) = compare_arms(load(lines_beside(other, 3.0, targets=100_000)))
    assert list(result.lines) == ["identity"]
    assert "other targets" in caption(result)


def test_two_architectures_at_several_sizes_are_compared_elsewhere(sweep):
    assert compare_arms(load(sweep)) == ()


def test_only_the_longest_horizon_is_compared(tmp_path):
    study = replace(STUDY, horizons=(4.5e5, 9e5))
    (result,) = compare_arms(load(write(study, tmp_path / "two", np.random.default_rng(0))))
    assert result.place.tokens == 9e5
    assert len(result.arms[0].seeds) == 3


def test_the_report_shows_arms_and_tuning_and_redraws_for_new_lines(root, tmp_path):
    root = shutil.copytree(root, tmp_path / "arms")
    report = redraw(root)
    page = report.page.read_text()
    assert page.index("Architectures side by side") < page.index("refused, and why")
    assert "Warning: tuning is unequal. No evidence is stated for identity" in page
    assert "Equal tuning?" in page
    table = pd.read_csv(report.page.parent / "tables" / "arms.csv")
    assert list(table["verdict_bigram"])[:2] == ["beats", "beats"]
    assert (report.page.parent / "figures" / "architectures.svg").exists()
    assert "lowest loss transformer" in report.text()
    assert "bigram" in report.text()
    written = report.page.stat().st_mtime_ns
    assert redraw(root).page.stat().st_mtime_ns == written
    lines_beside(root, 9.0)
    assert redraw(root).page.stat().st_mtime_ns > written
    changed = report.page.stat().st_mtime_ns
    pd.read_parquet(root / "ladder.parquet").assign(state_bytes=1).to_parquet(
        root / "ladder.parquet"
    )
    assert redraw(root).page.stat().st_mtime_ns > changed
