"""Gaps of tuning from probes: closed forms, simulated quadratic arms, and every verdict."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.effects.seed_noise import ASSUMED_SEED_SD
from analysis.effects.tuning import (
    BRACKETED,
    EDGE,
    FLAT,
    INSIDE,
    ONE_SIDED,
    UNCHECKED,
    Gap,
    tuning_gaps,
    unchecked,
)
from analysis.tables.document_losses import DocumentLosses
from analysis.tables.probes import PROBE_COLUMNS
from analysis.tables.run_table import COLUMNS, RUN_COLUMNS, Table

SD = ASSUMED_SEED_SD
LOSS = 2.0


def table(arms, *, direction="learning_rate_factor", documents=None):
    """A study without rows whose arms are given as {name: {factor: ln L less that in use}}.

    A change of None is a probe without a loss, one of infinity a diverged one.
    """
    records = []
    for name, changes in arms.items():
        for factor, change in changes.items():
            status = "done"
            if change is None or not math.isfinite(change):
                status = "running" if change is None else "diverged"
            factors = {"learning_rate_factor": 1.0, "batch_factor": 1.0, direction: factor}
            records.append(
                {
                    "run_id": f"{name} x {factor}", "status": status, "architecture": name,
                    "rung": "r30k", "corpus": "web", "seed": 0, "order_seed": 0,
                    "parameters": 3e4, "compared_with": f"{name} in use", "loss_in_use": LOSS,
                    "loss_nats": LOSS * math.exp(change) if status == "done" else math.nan,
                    **factors,
                }
            )  # fmt: skip
    empty = pd.DataFrame(columns=pd.Index(list(COLUMNS)))
    return Table(
        "t", "prose", empty, pd.DataFrame(columns=pd.Index(RUN_COLUMNS)), (), {},
        probes=pd.DataFrame(records, columns=pd.Index(PROBE_COLUMNS)), documents=documents or {},
    )  # fmt: skip


def gap(changes, **options) -> Gap:
    (found,) = tuning_gaps(table({"a": changes}, **options))
    return found


def quadratic(optimum, curvature, factors=(0.5, 2.0)):
    """Changes of ln L from the run in use, at factors on it, without noise."""
    return {f: curvature * ((math.log2(f) - optimum) ** 2 - optimum**2) for f in factors}


def test_an_exact_parabola_gives_the_exact_gap_less_what_noise_flatters():
    for optimum in (-1.2, -0.5, 0.0, 0.9):
        found = gap(quadratic(optimum, 0.5))
        # The slope at the lowest point has the variance of l'(x) @ noise, from Lagrange's weights.
        x = optimum
        weights = np.array([x - 0.5, -2 * x, x + 0.5])
        flattered = SD**2 * (weights @ weights) / (4 * 0.5)
        assert found.gap.estimate == pytest.approx(max(0, 0.5 * optimum**2 - flattered), abs=1e-12)
        assert found.best_factor == pytest.approx(2.0**optimum)


def test_a_gap_on_the_batch_is_read_from_the_probes_of_the_batch():
    found = gap(quadratic(0.8, 0.5), direction="batch_factor")
    assert found.direction == "batch"
    assert found.best_factor == pytest.approx(2.0**0.8)


@pytest.mark.parametrize(("optimum", "curvature"), [(0.0, 0.03), (0.4, 0.05), (0.9, 0.05)])
def test_intervals_of_simulated_arms_cover_their_gap_and_estimates_are_not_biased(
    optimum, curvature
):
    generator, arms = np.random.default_rng(0), 400
    truth = curvature * optimum**2
    drawn = {}
    for arm in range(arms):
        in_use, half, twice = generator.normal(0, SD, 3)
        exact = quadratic(optimum, curvature)
        drawn[str(arm)] = {0.5: exact[0.5] + half - in_use, 2.0: exact[2.0] + twice - in_use}
    found = tuning_gaps(table(drawn))
    inside = [each.gap.low <= truth <= each.gap.high for each in found]
    assert np.mean(inside) > 0.93
    estimates = np.array([each.gap.estimate for each in found])
    # A gap is at least zero, so where the truth is zero its mean lies above it.
    allowed = 3 * estimates.std() / math.sqrt(arms) + (SD / 4 if truth == 0 else 0)
    assert abs(estimates.mean() - truth) < allowed


def test_a_run_with_worse_neighbours_is_bracketed():
    found = gap({0.5: 0.05, 2.0: 0.04})
    assert found.verdict == BRACKETED
    assert not found.clear
    assert found.missing == ()


def test_neighbours_that_are_equal_within_noise_are_flat_and_leave_nothing():
    for changes in ({0.5: 0.004, 2.0: -0.004}, {0.5: -0.01, 2.0: 0.002}):
        found = gap(changes)
        assert found.verdict == FLAT
        assert not found.clear
        assert found.gap.high < 0.03


def test_an_optimum_among_the_tried_factors_is_inside_and_its_gap_clear():
    found = gap(quadratic(-1.0, 0.05))
    assert found.verdict == INSIDE
    assert found.clear
    assert found.gap.low <= 0.05 <= found.gap.high


@pytest.mark.parametrize(("sign", "wanted"), [(-1, 0.25), (1, 4.0)])
def test_an_optimum_three_doublings_away_is_not_bracketed(sign, wanted):
    changes = quadratic(3.0 * sign, 0.02)
    found = gap(changes)
    assert found.verdict == EDGE
    assert found.gap.estimate == pytest.approx(-min(changes.values()))
    assert found.gap.high == math.inf
    assert found.missing == (wanted,)


def test_a_further_probe_settles_what_two_leave_open():
    found = gap(quadratic(-2.0, 0.05, (0.25, 0.125, 0.5, 2.0)))
    assert found.verdict == INSIDE
    assert found.gap.low <= 0.2 <= found.gap.high
    assert found.best_factor == pytest.approx(0.25)


def test_a_diverged_probe_is_worse_than_any_loss():
    held = gap({0.5: 0.05, 2.0: math.inf})
    assert held.verdict == BRACKETED
    assert held.gap.estimate == 0.0
    better = gap({0.5: -0.1, 2.0: math.inf})
    assert better.verdict == EDGE
    assert better.missing == (0.25,)
    assert better.gap.low > 0.05


def test_a_missing_probe_leaves_the_choice_unchecked_unless_the_other_one_is_better():
    half = gap({0.5: None, 2.0: 0.05})
    assert half.verdict == UNCHECKED
    assert half.missing == (0.5,)
    assert half.gap.estimate == 0.0
    assert half.gap.high > 0.0
    better = gap({0.5: -0.1, 2.0: None})
    assert better.verdict == EDGE


def test_probes_on_one_side_say_so_unless_they_are_better():
    worse = gap({2.0: 0.08}, direction="batch_factor")
    assert worse.verdict == ONE_SIDED
    assert worse.missing == ()
    assert unchecked((worse,)) is None
    assert gap({2.0: -0.08}, direction="batch_factor").verdict == EDGE


def test_documents_on_which_the_runs_differ_widen_the_interval():
    targets = np.full(8, 100.0)
    even = DocumentLosses(np.full(8, 25.0), targets)
    uneven = DocumentLosses(np.linspace(10.0, 40.0, 8), targets)

    def of(half):
        names = {"a in use": even, "a x 0.5": half, "a x 2.0": even}
        return gap(
            {0.5: 0.05, 2.0: math.inf},
            documents={name: {"prose": each} for name, each in names.items()},
        ).error

    shares = uneven.nats / uneven.nats.sum() - even.nats / even.nats.sum()
    expected = math.sqrt(2 * SD**2 + 8 / 7 * float(shares @ shares))
    assert of(even) == pytest.approx(math.sqrt(2) * SD)
    assert of(uneven) == pytest.approx(expected)
