"""Answers of `python -m analysis.fit` beyond the parameters, one line each.

The compute-optimal size and tokens of a budget, with and without inference; the loss gap between
two arms converted to tokens, FLOPs, parameters and seconds; and whether Hoffmann's three approaches
agree. Costs are the FLOPs in the table, or 6 N D where it has none, and the line says which.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.compute_optimal.allocation import Allocation, Ladder, Question, allocate, cheapest
from analysis.compute_optimal.three_approaches import all_three
from analysis.effects.multipliers import (
    compute_multiplier,
    data_multiplier,
    parameter_multiplier,
    rows_of,
)
from analysis.effects.resources import (
    DECODING_STATE,
    TRAINING_MEMORY,
    WALL_CLOCK,
    resource_multiplier,
)
from analysis.fitting.estimator import Fit
from analysis.inference.bootstrap import Bootstrap, replicate
from analysis.inference.intervals import Interval
from analysis.laws.law import group_of
from analysis.tables.compute import six_nd, training_flops
from analysis.tables.frames import floats, keep
from analysis.tables.run_region import flops_per_token, seconds_per_token
from analysis.validity.extrapolation import Target, extrapolation
from analysis.validity.refusal import Refusal
from analysis.words.numbers import bracketed, with_unit
from analysis.words.sentences import multiplier_sentence

REPLICATES = 400
BEYOND = 10.0
"""Sizes are searched this factor beyond those that were run where the cost is 6 N D."""
SERVING_SHARE = 1 / 3
"""A served token is a forward pass: a third of a training step's FLOPs (Kaplan 2001.08361, 2.1)."""


@dataclass(frozen=True)
class Budget:
    """A compute budget.

    Attributes:
        flops: on training.
        served: tokens that the trained model will serve.
        allow: answer beyond ten times the largest compute all the same.
    """

    flops: float
    served: float = 0.0
    allow: bool = False


def bootstrap(fit: Fit, seed: int = 0) -> Bootstrap:
    """Bootstrap of a fit to any table; without arms all is one arm, without trunks each row one."""
    missing = {name: "one" for name in ("architecture", "corpus") if name not in fit.rows}
    rows = fit.rows.assign(**missing)
    if "trunk_id" not in rows:
        rows = rows.assign(trunk_id=[str(row) for row in range(len(rows))])
    return replicate(replace(fit, rows=rows), REPLICATES, np.random.default_rng(seed))


def approaches(rows: pd.DataFrame, by: tuple[str, ...]) -> Iterator[str]:
    """The exponents of the best size and tokens, by each of Hoffmann's approaches, per arm."""
    labels = np.array(group_of(rows, by))
    priced = rows.assign(flops=training_flops(rows))
    for arm in dict.fromkeys(labels.tolist()):
        for approach in all_three(keep(priced, labels == arm).reset_index(drop=True)):
            size, tokens = (_or_why(each) for each in (approach.parameters, approach.tokens))
            who = f"{arm}: " if arm else ""
            text = size if size == tokens else f"N* ~ C^a, a = {size}; D* ~ C^b, b = {tokens}"
            yield f"{who}approach {approach.name}: {text}"
            yield from (f"  {caveat}" for caveat in approach.warnings)


def spending(fit: Fit, replicates: Bootstrap, budget: Budget) -> Iterator[str]:
    """The best size and tokens of each arm, by its own FLOPs and, where measured, its own speed."""
    for arm in fit.form.groups:
        who = f"{arm}: " if arm else ""
        yield from (f"{who}{line}" for line in _spend(fit, arm, replicates, budget))


def _spend(fit: Fit, arm: str, replicates: Bootstrap, budget: Budget) -> Iterator[str]:
    rows = rows_of(fit, arm)
    question, counted = _question(fit, arm, rows)
    best = allocate(question, budget.flops, replicates)
    yield f"{budget.flops:.3g} FLOPs{counted}: {_allocated(best)}"
    if isinstance(best, Refusal):
        return
    target = Target(best.parameters, best.tokens, budget.flops)
    doubt = extrapolation(rows.assign(flops=training_flops(rows)), target, allow=budget.allow)
    if doubt is not None:
        yield f"  {doubt}"
    if budget.served:
        served = replace(
            question, served=budget.served,
            serving=lambda sizes: SERVING_SHARE * question.cost(sizes, np.ones_like(sizes)),
        )  # fmt: skip
        least = cheapest(served, best.loss)
        yield (
            f"cheapest for that loss, {with_unit(budget.served)} tokens served: {_allocated(least)}"
            + ("" if isinstance(least, Refusal) else f", {least.cost:.3g} FLOPs in total")
        )
    yield from _by_the_clock(question, rows, best)


def _by_the_clock(question: Question, rows: pd.DataFrame, best: Allocation) -> Iterator[str]:
    """The best size and tokens for the time that the FLOP-optimal run takes."""
    if "tokens_per_second" not in rows:
        return
    known = keep(rows, rows["tokens_per_second"].notna())
    if not len(known):
        return
    per_token = seconds_per_token(known)
    sizes = per_token.sizes
    if len(sizes) < 2 or not sizes[0] <= best.parameters <= sizes[-1]:
        yield "seconds: no measured speeds at sizes around this one"
        return
    ladder = Ladder(per_token)
    time = float(ladder(np.array([best.parameters]), np.array([best.tokens]))[0])
    clocked = replace(question, cost=ladder, sizes=(float(sizes[0]), float(sizes[-1])))
    yield f"best for the same {time:.3g} s of training: {_allocated(allocate(clocked, time))}"


def _question(fit: Fit, arm: str, rows: pd.DataFrame) -> tuple[Question, str]:
    sizes = np.unique(floats(rows, "parameters"))
    if "flops" in rows and len(sizes) > 1:
        return Question(
            fit, arm, Ladder(flops_per_token(rows)), (float(sizes[0]), float(sizes[-1]))
        ), ""
    ends = (float(sizes[0]) / BEYOND, float(sizes[-1]) * BEYOND)
    return Question(fit, arm, six_nd, ends), " counted as 6 N D"


def _allocated(allocation: Allocation | Refusal) -> str:
    if isinstance(allocation, Refusal):
        return str(allocation)
    spread = ""
    if isinstance(allocation.size_interval, Interval):
        low, high = (
            with_unit(end) for end in (allocation.size_interval.low, allocation.size_interval.high)
        )
        spread = f" [{low}, {high}]"
    elif allocation.size_interval is not None:
        spread = f" (interval refused, {allocation.size_interval})"
    return (
        f"{with_unit(allocation.parameters)}{spread} parameters, "
        f"{with_unit(allocation.tokens)} tokens "
        f"({allocation.tokens / allocation.parameters:.3g} per parameter), "
        f"loss {allocation.loss:.4g} nats"
    )


def lead(fit: Fit, replicates: Bootstrap, baseline: str) -> Iterator[str]:
    """The loss gap between the baseline and each other arm, converted to resources.

    Raises:
        ValueError: no arm has the baseline's name.
    """
    if baseline not in fit.form.groups:
        arms = ", ".join(fit.form.groups)
        raise ValueError(f"--baseline {baseline!r} is not an arm; the arms are {arms}")
    counted = replace(fit, rows=fit.rows.assign(flops=training_flops(fit.rows)))
    for other in (arm for arm in fit.form.groups if arm != baseline):
        ways = {
            "tokens": data_multiplier(counted, replicates, baseline, other),
            "training FLOPs": compute_multiplier(counted, replicates, baseline, other),
            "parameters": parameter_multiplier(counted, replicates, baseline, other),
        }
        for resource in (WALL_CLOCK, TRAINING_MEMORY, DECODING_STATE):
            if resource.column in counted.rows:
                pair = (baseline, other)
                ways[resource.quantity] = resource_multiplier(counted, replicates, pair, resource)
        for quantity, multiplier in ways.items():
            if isinstance(multiplier, Refusal):
                yield f"{quantity} of {other} over {baseline}: {multiplier}"
            else:
                yield multiplier_sentence(multiplier)


def _or_why(interval: Interval | Refusal) -> str:
    return str(interval) if isinstance(interval, Refusal) else bracketed(interval)
