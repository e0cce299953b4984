"""Parameters, seconds, bytes: equal to a search for the same loss, refused where not measured."""

import numpy as np
import pytest
from scipy.optimize import brentq

from analysis.effects.multipliers import compute_multiplier, parameter_multiplier
from analysis.effects.resources import (
    DECODING_STATE,
    WALL_CLOCK,
    resource_multiplier,
)
from analysis.fitting.estimator import Estimator
from analysis.inference.bootstrap import replicate
from analysis.laws.catalog import nested_family
from analysis.tables.run_table import final
from analysis.tables.sweep_folder import load
from analysis.validity.refusal import Refusal

LAW = nested_family(("architecture", "corpus"))["Meab"]
BASE, OTHER = "transformer on web", "mamba on web"


@pytest.fixture(scope="module")
def fitted(sweep):
    rows = final(load(sweep)).rows
    rows = rows[rows["evaluation_set"] == "prose"]
    slow = np.where(rows["architecture"] == "mamba", 0.5, 1.0)
    # A speed that falls with size as the FLOPs do, at half the rate for one arm.
    speed = slow * 1e12 / (rows["flops"] / rows["tokens"])
    state = np.where(rows["architecture"] == "mamba", 1.0, 4.0) * rows["parameters"]
    result = Estimator().fit(rows.assign(tokens_per_second=speed, state_bytes=state), LAW)
    return result, replicate(result, 100, np.random.default_rng(0))


def test_half_the_speed_halves_the_wall_clock_multiplier(fitted):
    flops = compute_multiplier(*fitted, BASE, OTHER).factor.estimate
    wall = resource_multiplier(*fitted, (BASE, OTHER), WALL_CLOCK).factor.estimate
    assert wall == pytest.approx(0.5 * flops, rel=1e-3)


def test_a_parameter_multiplier_is_the_ratio_of_sizes_at_equal_loss(fitted):
    result = parameter_multiplier(*fitted, BASE, OTHER)
    rows = fitted[0].rows
    mine = rows[(rows["architecture"] == "transformer") & (rows["corpus"] == "web")]
    tokens = float(np.exp(np.log(mine["tokens"]).mean()))
    sizes = []
    for group in (BASE, OTHER):
        p = {n: float(v) for n, v in fitted[0].form.natural(fitted[0].theta, group).items()}

        def miss(log_size, p=p):
            by_data = np.exp(p["B"] - p["beta"] * np.log(tokens))
            by_size = np.exp(p["A"] - p["alpha"] * log_size)
            return np.exp(p["E"]) + by_size + by_data - result.loss_nats

        sizes.append(np.exp(brentq(miss, np.log(1e3), np.log(1e9))))
    assert result.factor.estimate == pytest.approx(sizes[0] / sizes[1], rel=1e-8)


def test_an_arm_with_a_quarter_of_the_state_needs_less_memory(fitted):
    result = resource_multiplier(*fitted, (BASE, OTHER), DECODING_STATE)
    assert result.factor.estimate > 4.0


def test_what_was_not_measured_is_refused(fitted):
    fit, replicates = fitted
    bare = Estimator().fit(fit.rows.drop(columns="tokens_per_second"), LAW)
    refused = resource_multiplier(bare, replicates, (BASE, OTHER), WALL_CLOCK)
    assert isinstance(refused, Refusal)
    assert "tokens_per_second" in refused.remedy
