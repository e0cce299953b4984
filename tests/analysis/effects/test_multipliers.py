"""Multipliers: equal to a search for the same loss, with intervals, refused out of reach."""

import numpy as np
import pytest

from analysis.effects.multipliers import Multiplier, compute_multiplier, data_multiplier, frontier
from analysis.fitting.estimator import Estimator
from analysis.inference.bootstrap import replicate
from analysis.laws.catalog import nested_family
from analysis.tables.run_region import run_region
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal
from tests.analysis.synthetic_study import Study, write
from tests.oracles import fits as oracle

LAW = nested_family(("architecture", "corpus"))["Meab"]
BASE, OTHER = "transformer on web", "mamba on web"


@pytest.fixture(scope="module")
def fitted(sweep):
    rows = final(load(sweep)).rows
    result = Estimator().fit(rows[rows["evaluation_set"] == "prose"], LAW)
    return result, replicate(result, 200, np.random.default_rng(0))


def curve(fit, group, parameters):
    values = {name: float(value) for name, value in fit.form.natural(fit.theta, group).items()}
    named = [np.exp(values[name]) for name in ("E", "A")]
    named += [values["alpha"], np.exp(values["B"]), values["beta"]]
    return lambda tokens: oracle.chinchilla(named, parameters, tokens)


def test_a_data_multiplier_is_the_ratio_of_tokens_at_equal_loss(fitted):
    result = data_multiplier(*fitted, BASE, OTHER)
    needed = [
        oracle.tokens_for_loss(curve(fitted[0], name, result.size), result.loss_nats)
        for name in (BASE, OTHER)
    ]
    assert result.factor.estimate == pytest.approx(needed[0] / needed[1], rel=1e-9)


def test_a_compute_multiplier_is_the_ratio_of_cheapest_flops_at_equal_loss(fitted, study):
    result = compute_multiplier(*fitted, BASE, OTHER)
    cheapest = []
    for name in (BASE, OTHER):
        factor = study.flops_factor[name.split()[0]]
        rows = fitted[0].rows[fitted[0].rows["architecture"] == name.split()[0]]
        sizes = np.geomspace(rows["parameters"].min(), rows["parameters"].max(), 400)
        cheapest.append(
            min(
                factor
                * size
                * oracle.tokens_for_loss(curve(fitted[0], name, size), result.loss_nats)
                for size in sizes
                if curve(fitted[0], name, size)(1e12) < result.loss_nats
            )
        )
    assert result.factor.estimate == pytest.approx(cheapest[0] / cheapest[1], rel=2e-3)


def test_the_better_arm_has_a_multiplier_above_one_with_an_interval(fitted):
    result = data_multiplier(*fitted, BASE, OTHER)
    assert isinstance(result, Multiplier)
    assert 1 < result.factor.low < result.factor.estimate < result.factor.high


def test_swapping_the_arms_inverts_the_multiplier(fitted):
    there = compute_multiplier(*fitted, BASE, OTHER).factor.estimate
    back = compute_multiplier(*fitted, OTHER, BASE).factor.estimate
    assert there * back == pytest.approx(1.0, rel=1e-6)


def test_a_frontier_stays_inside_the_data_and_falls(fitted):
    result = frontier(fitted[0], OTHER)
    rows = fitted[0].rows[fitted[0].rows["architecture"] == "mamba"]
    assert result["tokens"].between(0.99 * rows["tokens"].min(), 1.01 * rows["tokens"].max()).all()
    assert (result["loss_nats"].diff().dropna() < 1e-3).all()


def test_costs_are_those_of_the_sizes_that_were_run(fitted, study):
    rows = fitted[0].rows[fitted[0].rows["architecture"] == "mamba"]
    arm = run_region(rows)
    np.testing.assert_allclose(
        arm.cost(arm.parameters), arm.parameters * study.flops_factor["mamba"], rtol=1e-3
    )


def test_arms_that_reach_no_common_loss_are_refused(tmp_path):
    study = Study(architecture_effect=-0.6, seeds={})
    root = write(study, tmp_path / "far", np.random.default_rng(0))
    rows = final(load(root)).rows
    result = Estimator().fit(rows[rows["evaluation_set"] == "prose"], LAW)
    replicates = replicate(result, 20, np.random.default_rng(0))
    for multiplier in (data_multiplier, compute_multiplier):
        refused = multiplier(result, replicates, BASE, OTHER)
        assert isinstance(refused, Refusal)
        assert refused.code == "R-REACH"
