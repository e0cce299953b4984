"""Synthetic studies: what intervals promise holds, within what 200 draws can tell."""

import pytest

from tests.benchmarks.statistics.recovery import INSIDE, Draws, Rate, draw_inside, generator_of

DRAWS = 200


@pytest.mark.slow
@pytest.mark.parametrize("kind", INSIDE)
def test_intervals_inside_the_data_cover_the_truth_as_often_as_they_say(kind):
    rates, bias = Draws(DRAWS).coverage(kind)
    assert all(rate.compatible() for rate in rates), [(r.name, r.value) for r in rates]
    assert all(abs(value) < 0.5 for value in bias.values()), bias


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["iid", "clustered"])
def test_arms_without_a_difference_are_said_to_differ_one_time_in_twenty(kind):
    rate = Draws(DRAWS).positives(kind, 0.0)
    assert rate.compatible(), rate
    assert Draws(20).positives(kind, -0.02).value > 0.9


@pytest.mark.slow
def test_back_tested_intervals_cover_larger_runs_of_laws_that_are_not_fitted():
    full, bare = Draws(60).extrapolation()
    assert full.value >= 0.85
    assert full.value >= bare.value


def test_draws_depend_on_their_name_and_number_alone():
    first, again = (draw_inside("iid", 3).rows["loss_nats"].sum() for _ in range(2))
    assert first == again != draw_inside("iid", 4).rows["loss_nats"].sum()
    assert generator_of("a", 0).random() != generator_of("b", 0).random()


def test_counts_that_no_rate_inside_the_range_explains_are_incompatible():
    assert Rate("x", 190, 200, 0.935, 0.965).compatible()
    assert not Rate("x", 170, 200, 0.935, 0.965).compatible()
    assert not Rate("x", 30, 200, 0.035, 0.065).compatible()
