"""Schedules and events as pure functions."""

import math

import pytest

from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.ids import trunk_id
from trainer.schedule import decay_begins, learning_rate, run_milestones
from trainer.schema import ConfigError, load, merge

STEPS, WARMUP, PEAK = 20, 4, 0.01
"""Of the plain run."""


def rates_of(plain: dict, schedule: dict) -> list[float]:
    config = load(RunConfig, merge(plain, {"schedule": schedule}))
    assert config.steps == STEPS
    return [learning_rate(config, step) for step in range(STEPS)]


def plain_schedule(plain: dict, kind: str) -> dict:
    return {**plain, "schedule": {"warmup_tokens": WARMUP * 512, "kind": kind}}


def test_the_rate_warms_up_stays_and_falls_to_nothing(plain: dict) -> None:
    config = load(RunConfig, plain)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:15] == [0.01] * 11
    assert rates[15:] == pytest.approx([0.01 * k / 6 for k in (5, 4, 3, 2, 1)])


FALL = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
    "sqrt": lambda done: 1 - done**0.5,
}
"""The closed forms, by the share of the decay that is done."""


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("shape", FALL)
def test_the_decay_of_a_shared_trunk_has_its_closed_form(
    plain: dict, shape: str, final: float
) -> None:
    rates = rates_of(plain, {"decay_shape": shape, "final_share": final})
    begin = 15
    assert rates[WARMUP - 1 : begin] == [PEAK] * (begin - WARMUP + 1)
    done = [(step - begin + 1) / (STEPS - begin + 1) for step in range(begin, STEPS)]
    shares = [final + (1 - final) * FALL[shape](each) for each in done]
    assert rates[begin:] == pytest.approx([PEAK * share for share in shares], rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_rate_that_falls_from_the_warm_up_on_has_its_closed_form(
    plain: dict, kind: str, final: float
) -> None:
    rates = rates_of(plain_schedule(plain, kind), {"final_share": final})
    assert rates[:WARMUP] == pytest.approx([PEAK * (k + 1) / WARMUP for k in range(WARMUP)])
    done = [(step - WARMUP + 1) / (STEPS - WARMUP + 1) for step in range(WARMUP, STEPS)]
    shares = [final + (1 - final) * FALL[kind](each) for each in done]
    assert rates[WARMUP:] == pytest.approx([PEAK * share for share in shares], rel=1e-12)
    assert rates[WARMUP - 1 :] == sorted(rates[WARMUP - 1 :], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_horizons_share_nothing_where_the_rate_falls_from_the_warm_up_on(
    plain: dict, kind: str
) -> None:
    plain = plain_schedule(plain, kind)
    short, long = (
        load(RunConfig, merge(plain, {"budget": {"tokens": tokens}})) for tokens in (10240, 20480)
    )
    assert trunk_id(short) != trunk_id(long)
    assert learning_rate(short, WARMUP) < learning_rate(long, WARMUP) < PEAK


def test_shapes_of_the_decay_share_a_trunk(plain: dict) -> None:
    shapes = [load(RunConfig, merge(plain, {"schedule": {"decay_shape": s}})) for s in FALL]
    assert len({trunk_id(config) for config in shapes}) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("decay_fraction", 0.25), ("decay_shape", "sqrt")], ids=str
)
def test_a_key_of_another_kind_of_schedule_is_refused(plain: dict, key: str, value: object) -> None:
    plain = plain_schedule(plain, "cosine")
    message = rf"schedule\.{key} is {value}, but kind cosine decays from the end .*; remove it"
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, merge(plain, {"schedule": {key: value}}))


def test_a_warm_up_that_leaves_no_step_to_decay_is_refused(plain: dict) -> None:
    plain = merge(plain_schedule(plain, "cosine"), {"schedule": {"warmup_tokens": STEPS * 512}})
    with pytest.raises(ConfigError, match=r"warmup_tokens 10240 leaves no step .* at most 9728"):
        load(RunConfig, plain)
    load(RunConfig, merge(plain, {"schedule": {"warmup_tokens": 9728}}))


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
