"""Iso-loss multipliers: the loss gap between two arms converted to tokens or training FLOPs.

Ours: the multiplier is taken at one loss that both arms have reached inside their runs, as it
diverges near the floor, and is refused where more than 5 % of the bootstrap is undefined.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Fit
from analysis.inference.bootstrap import Bootstrap
from analysis.inference.intervals import Interval
from analysis.laws.law import group_of
from analysis.tables.frames import Array, floats, keep
from analysis.tables.run_region import run_region
from analysis.validity.refusal import Refusal

LOSSES = 81
CURVE = 80


@dataclass(frozen=True)
class Multiplier:
    """A resource the baseline needs to reach one loss, over what the other arm needs.

    Attributes:
        factor: above 1, the baseline needs more: the other arm is more efficient.
        size: parameters of both arms, or None where each has its best size.
    """

    quantity: str
    baseline: str
    other: str
    factor: Interval
    loss_nats: float
    size: float | None


def frontier(fit: Fit, group: str) -> pd.DataFrame:
    """The lowest fitted loss at each compute inside one arm's sizes and tokens."""
    arm = run_region(rows_of(fit, group))
    sizes = arm.grid()
    cost = arm.cost(sizes)
    compute = np.geomspace(cost[0] * arm.tokens[0], cost[-1] * arm.tokens[1], CURVE)
    tokens = compute[:, None] / cost
    loss = np.where(arm.was_run(sizes, tokens), fit.surface(group).loss(sizes, tokens), np.inf)
    best = loss.argmin(axis=1)
    index = np.arange(CURVE)
    curve = pd.DataFrame(
        {
            "flops": compute,
            "loss_nats": loss[index, best],
            "parameters": sizes[best],
            "tokens": tokens[index, best],
        }
    )
    return keep(curve, np.isfinite(floats(curve, "loss_nats")))


def data_multiplier(
    fit: Fit, replicates: Bootstrap, baseline: str, other: str
) -> Multiplier | Refusal:
    """Tokens the baseline needs over tokens the other arm needs, at equal size and equal loss."""
    arms = {name: run_region(rows_of(fit, name)) for name in (baseline, other)}
    size = float(np.exp(np.log(floats(rows_of(fit, baseline), "parameters")).mean()))
    bounds = {
        name: fit.surface(name).loss(size, np.array(arm.tokens))[0] for name, arm in arms.items()
    }
    low = max(float(each.min()) for each in bounds.values())
    high = min(float(each.max()) for each in bounds.values())
    if low >= high:
        return Refusal(
            "R-REACH",
            f"at {size:.3g} parameters {other} and {baseline} reach no common loss",
            "add horizons so that the arms' losses overlap",
        )
    loss = float(np.sqrt(low * high))
    point, spread = (
        np.log(fit.surface(baseline, theta).tokens(size, loss)[:, 0])
        - np.log(fit.surface(other, theta).tokens(size, loss)[:, 0])
        for theta in (fit.theta[None], replicates.theta)
    )
    interval = replicates.interval(float(point[0]), spread)
    if isinstance(interval, Refusal):
        return interval
    return Multiplier("tokens", baseline, other, interval.mapped(_exp), loss, size)


def common_loss(fit: Fit, baseline: str, other: str) -> float | Refusal:
    """A loss on both arms' frontiers whose compute-optimal points were run by both."""
    curves = [floats(frontier(fit, name), "loss_nats") for name in (baseline, other)]
    low, high = max(curve.min() for curve in curves), min(curve.max() for curve in curves)
    if low >= high:
        return Refusal(
            "R-REACH",
            f"the frontiers of {other} and {baseline} reach no common loss",
            "add sizes or horizons so that the arms' losses overlap",
        )
    # From the middle outwards: there both frontiers are surrounded by runs.
    losses = np.geomspace(low, high, LOSSES)[np.argsort(np.abs(np.arange(LOSSES) - LOSSES // 2))]
    for loss in losses:
        if all(_optimum_is_inside(fit, name, float(loss)) for name in (baseline, other)):
            break
    else:
        return Refusal(
            "R-REACH",
            "no loss has both compute-optimal points inside the sizes and tokens that were run",
            "add horizons around the frontier",
        )
    return float(loss)


def compute_multiplier(
    fit: Fit, replicates: Bootstrap, baseline: str, other: str
) -> Multiplier | Refusal:
    """Training FLOPs the baseline needs over those the other arm needs, each at its best size."""
    loss = common_loss(fit, baseline, other)
    if isinstance(loss, Refusal):
        return loss
    point, spread = (
        np.log(_flops_for(fit, theta, baseline, loss)) - np.log(_flops_for(fit, theta, other, loss))
        for theta in (fit.theta[None], replicates.theta)
    )
    interval = replicates.interval(float(point[0]), spread)
    if isinstance(interval, Refusal):
        return interval
    return Multiplier("training FLOPs", baseline, other, interval.mapped(_exp), loss, None)


def _exp(value: float) -> float:
    return float(np.exp(value))


def rows_of(fit: Fit, group: str) -> pd.DataFrame:
    """The rows of one group of a fit."""
    return keep(fit.rows, np.array(group_of(fit.rows, fit.law.by)) == group)


def _flops_for(fit: Fit, theta: Array, group: str, loss: float) -> Array:
    arm = run_region(rows_of(fit, group))
    sizes = arm.grid()
    return (fit.surface(group, theta).tokens(sizes, loss) * arm.cost(sizes)).min(axis=1)


def _optimum_is_inside(fit: Fit, group: str, loss: float) -> bool:
    arm = run_region(rows_of(fit, group))
    sizes = arm.grid()
    tokens = fit.surface(group).tokens(sizes, loss)[0]
    best = (tokens * arm.cost(sizes)).argmin()
    return bool(np.isfinite(tokens[best]) and arm.was_run(sizes, tokens)[best])
