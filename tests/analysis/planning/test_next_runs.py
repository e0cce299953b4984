"""Design: widths that simulation confirms, and advice that pays."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.effects.contrasts import contrasts
from analysis.fitting.estimator import Estimator
from analysis.inference.intervals import t_quantile
from analysis.laws.bound import bind, log_loss
from analysis.laws.catalog import CHINCHILLA, GAMMA
from analysis.planning.expected_precision import (
    USUAL,
    PlannedNoise,
    expect,
    expectation_lines,
    exponent_widths,
    measured_noise,
)
from analysis.planning.next_runs import (
    Belief,
    Terms,
    advise,
    design_map,
    half_width,
    loss_at,
)
from analysis.tables.document_losses import DocumentLosses
from analysis.tables.run_table import Table, final
from analysis.tables.sweep_folder import load
from tests.analysis.parameters import theta_of
from tests.benchmarks.statistics import design as demonstration

TRUTH = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}


def planned(sizes=5, horizons=3, arms=2, corpora=2, seeds=1):
    rows = []
    for place, size in enumerate(np.geomspace(1e7, 1e9, sizes)):
        for arm in range(arms):
            for corpus in range(corpora):
                for seed in range(seeds):
                    trunk = f"{place}/{arm}/{corpus}/{seed}"
                    for tokens in np.geomspace(1e9, 5e10, horizons):
                        rows.append(
                            (f"a{arm}", f"c{corpus}", f"r{place}", seed, trunk, size, tokens)
                        )
    columns = ["architecture", "corpus", "rung", "seed", "trunk_id", "parameters", "tokens"]
    frame = pd.DataFrame(rows, columns=columns)
    names = [f"run{n}" for n in range(len(frame))]
    return frame.assign(order_seed=frame["seed"], run_id=names)


def runs(sizes, ratios):
    n, m = np.meshgrid(sizes, ratios)
    frame = pd.DataFrame({"parameters": n.ravel(), "tokens": (n * m).ravel()})
    return frame.assign(flops=6 * frame["parameters"] * frame["tokens"])


def belief(law=CHINCHILLA, draws=4, spread=0.01):
    rows = runs(np.geomspace(1e7, 1e9, 5), [5, 20, 80])
    form = bind(law, rows)
    theta = theta_of(form, TRUTH if law is CHINCHILLA else {**TRUTH, "power": 1.0})
    noise = np.random.default_rng(0).normal(0, spread, (draws, len(theta)))
    return Belief(form, theta + noise)


FAR = loss_at(runs([4e9], [20.0]))


def test_expected_widths_of_exponents_are_those_of_simulated_fits():
    grid = planned(sizes=6, horizons=4, arms=1, corpora=1)
    widths = exponent_widths(grid, USUAL)
    form = bind(CHINCHILLA, grid)
    exact = log_loss(form.design(grid), USUAL.theta(form)[None])[0]
    generator = np.random.default_rng(1)
    place = np.unique(grid["trunk_id"], return_inverse=True)[1]
    found = []
    for _ in range(60):
        luck = generator.normal(0, USUAL.noise.seed, place.max() + 1)[place]
        logs = exact + luck + generator.normal(0, USUAL.noise.point, len(grid))
        fitted = Estimator(delta=np.inf, starts=2).fit(
            grid.assign(loss_nats=np.exp(logs)), CHINCHILLA
        )
        found.append((fitted.parameters["alpha"], fitted.parameters["beta"]))
    quantile = t_quantile(1)
    for name, deviation in zip(("alpha", "beta"), np.std(found, axis=0), strict=True):
        # Least squares ignores the trunks, so it scatters a little more than the best estimator.
        assert 0.75 < deviation / (widths[name] / quantile) < 1.6


def documents_of(grid, factor, error):
    """Losses by document that leave this standard error on the effect of a factor."""
    draws = np.random.default_rng(3).normal(0, 1, 400)
    taste = error * np.sqrt(len(draws)) * (draws - draws.mean()) / draws.std(ddof=1)
    targets = np.full(len(draws), 100.0)
    first = grid[factor].iloc[0]
    return {
        run: {"s": DocumentLosses(targets * (1 + (level != first) * taste), targets)}
        for run, level in zip(grid["run_id"], grid[factor], strict=True)
    }


@pytest.mark.parametrize("evaluation", [0.0, 0.006])
@pytest.mark.parametrize("factor", ["corpus", "architecture"])
def test_expected_widths_of_effects_are_those_of_simulated_comparisons(factor, evaluation):
    by_size = {"corpus": 0.02, "architecture": 0.02, factor: 0.004}
    noise = PlannedNoise(0.005, 0.002, by_size, evaluation)
    grid = planned(sizes=5, horizons=2, seeds=2)
    expected = {each.quantity: each for each in expect(grid, replace(USUAL, noise=noise))}[factor]
    documents = documents_of(grid, factor, evaluation)
    generator, halves = np.random.default_rng(0), []
    level = grid[factor].to_numpy()
    place = np.unique(grid["trunk_id"], return_inverse=True)[1]
    for _ in range(120):
        trunk = generator.normal(0, noise.seed, place.max() + 1)[place]
        sizes = {(r, v): generator.normal(0, noise.by_size[factor] / np.sqrt(2))
                 for r in grid["rung"].unique() for v in np.unique(level)}  # fmt: skip
        by_size = [sizes[key] for key in zip(grid["rung"], level, strict=True)]
        logs = trunk + by_size + generator.normal(0, noise.point, len(grid))
        rows = grid.assign(
            loss_nats=np.exp(logs), evaluation_set="s", targets=1.0, utf8_bytes=1.0,
            certificate="x",
        )  # fmt: skip
        table = Table("t", "s", rows, grid, (), {}, documents=documents)
        (found,) = contrasts(table, factor, "s")
        halves.append(0.5 * (found.percent.high - found.percent.low))
    assert np.mean(halves) == pytest.approx(expected.half_width, rel=0.12)


def test_a_study_that_a_fit_would_refuse_is_told_so_beforehand():
    ladder = planned(horizons=1).assign(tokens=lambda rows: 20 * rows["parameters"])
    found = {each.quantity: each for each in expect(ladder, USUAL)}
    assert found["alpha"].half_width.code == "R-UNDER"
    assert "will be refused" in found["alpha"].sentence
    one = {each.quantity: each for each in expect(planned(arms=1), USUAL)}
    assert one["architecture"].half_width.code == "R-FACTOR"


@pytest.mark.parametrize("change", [{"sizes": 8}, {"seeds": 3}])
def test_more_sizes_or_seeds_narrow_what_is_expected(change):
    before = {each.quantity: each for each in expect(planned(), USUAL)}
    after = {each.quantity: each for each in expect(planned(**change), USUAL)}
    for name in before:
        assert after[name].half_width < before[name].half_width


def test_noise_is_read_off_finished_runs_where_they_can_tell(sweep, noise_free, study):
    found = measured_noise(final(load(sweep)))
    assert 0.3 < found.seed / study.seed_sd < 3
    assert measured_noise(final(noise_free)).seed < 1e-9
    without = final(load(sweep))
    rows = without.rows[without.rows["seed"] == 0].reset_index(drop=True)
    assert measured_noise(replace(without, rows=rows)) is None


def test_the_lines_name_every_assumption():
    text = "\n".join(expectation_lines(planned(), USUAL))
    for word in ("not a measurement", "alpha 0.34", "of seeds", "corpus effect", "+-"):
        assert word in text


def test_the_gradient_of_the_target_is_that_of_finite_differences():
    known, value = belief(), FAR
    gradient = value(known)[1]
    for slot in range(known.theta.shape[1]):
        step = np.zeros(known.theta.shape[1])
        step[slot] = 1e-3
        ahead, behind = (value(Belief(known.form, known.theta + s))[0] for s in (step, -step))
        np.testing.assert_allclose(gradient[:, slot], (ahead - behind) / 2e-3, rtol=1e-4, atol=1e-5)


def test_each_advised_run_narrows_the_target_as_announced():
    known, target = belief(draws=1, spread=0.0), FAR
    done, options = runs([1e7, 1e8], [5, 80]), runs(np.geomspace(1e7, 1e9, 6), [5, 20, 80, 300])
    advice = advise(done, options, [known], target, Terms(0.005, 1e21, 0.0, 4, 0.0))
    chosen = advice.runs[advice.runs["role"] == "fit"]
    for count in range(1, len(chosen) + 1):
        seen = pd.concat([done, chosen.iloc[:count]])
        width = half_width(seen, [known], target, 0.005)
        assert chosen["half_width"].iloc[count - 1] == pytest.approx(width, rel=1e-6)


def test_advice_keeps_to_its_budget_and_ends_with_a_run_held_out():
    options = runs(np.geomspace(1e7, 1e9, 6), [5, 20, 80, 300])
    budget = 3e20
    terms = Terms(0.005, budget, 0.0, 20, 0.3)
    advice = advise(runs([1e7], [5, 80]), options, [belief()], FAR, terms)
    assert advice.runs["flops"].sum() <= budget
    assert list(advice.runs["role"])[-1] == "hold-out"
    fits = advice.runs[advice.runs["role"] == "fit"]
    assert fits["flops"].sum() <= 0.7 * budget


def test_advice_stops_when_the_target_is_known_well_enough():
    options = runs(np.geomspace(1e7, 1e9, 6), [5, 20, 80, 300])
    advice = advise(options, options, [belief()], FAR, Terms(0.005, 1e22, 10.0, 5, 0))
    assert "narrow enough" in advice.stop
    assert "fit" not in set(advice.runs["role"])


def test_laws_that_disagree_widen_the_target():
    target = FAR
    done, one = runs(np.geomspace(1e7, 1e9, 4), [5, 20, 80]), belief()
    shifted = replace(one, theta=one.theta + np.eye(len(one.theta[0]))[-1] * 0.1)
    alone = half_width(done, [one], target, 0.005)
    assert half_width(done, [one, shifted], target, 0.005) > alone
    assert half_width(done, [one, belief(GAMMA)], target, 0.005) > alone


def test_every_one_of_1600_candidates_is_on_the_map_and_the_advice_ends():
    options = runs(np.geomspace(1e7, 1e10, 40), np.geomspace(1, 1000, 40))
    target = FAR
    found = design_map(runs([1e7, 1e8], [5, 80]), options, [belief(draws=20)], target, 0.005)
    terms = Terms(0.005, 1e30, 0.0, 60, 0.0)
    advice = advise(runs([1e7, 1e8], [5, 80]), options, [belief(draws=20)], target, terms)
    assert len(found) == 1600
    assert 0 < len(advice.runs) <= 61


@pytest.mark.parametrize("name", list(demonstration.TRUTHS))
def test_the_advisor_reaches_the_width_of_an_isoflop_grid_for_a_tenth_of_its_flops(name):
    found = demonstration.repetition(*demonstration.TRUTHS[name], np.random.default_rng(0))
    assert found.reached
    assert found.flops < 0.1 * found.grid_flops
    assert found.error < found.width
