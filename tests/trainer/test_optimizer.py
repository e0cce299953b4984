"""Schedules and events as pure functions."""

import pytest

from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.schedule import decay_begins, learning_rate, run_milestones
from trainer.schema import load


def test_the_rate_warms_up_stays_and_falls_to_nothing(plain: dict) -> None:
    config = load(RunConfig, plain)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:15] == [0.01] * 11
    assert rates[15:] == pytest.approx([0.01 * k / 6 for k in (5, 4, 3, 2, 1)])


def test_a_branch_has_its_trunks_rate_until_it_decays(plain: dict) -> None:
    short = load(RunConfig, plain)
    plain["budget"]["tokens"] *= 3
    long = load(RunConfig, plain)
    for step in range(decay_begins(short)):
        assert learning_rate(short, step) == learning_rate(long, step)
    assert learning_rate(short, decay_begins(short)) < learning_rate(long, decay_begins(short))


def test_a_run_saves_and_evaluates_where_it_should(plain: dict) -> None:
    config = load(RunConfig, plain)
    plan = run_milestones(
        config, ExecutionConfig(save_every_tokens=2048), EvaluationConfig(milestones=(5120,))
    )
    saves = [step for step in range(1, 21) if plan.events(step).save]
    evaluations = [step for step in range(1, 21) if plan.events(step).evaluate]
    assert saves == [4, 8, 12, 16, 20]
    assert evaluations == [10, 20]


def test_a_trunk_pins_its_forks_and_does_not_evaluate_its_end(plain: dict) -> None:
    plan = run_milestones(
        load(RunConfig, plain), ExecutionConfig(), EvaluationConfig(), frozenset({7, 20})
    )
    assert [s for s in range(1, 21) if plan.events(s).pin] == [7, 20]
    assert not plan.events(20).evaluate
