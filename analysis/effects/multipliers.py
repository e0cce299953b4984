"""Iso-loss multipliers: the loss gap between two arms in tokens, parameters or training FLOPs.

Ours: the multiplier is taken at one loss that both arms have reached inside their runs, as it
diverges near the floor, and is refused where more than 5 % of the bootstrap is undefined.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Fit
from analysis.fitting.loss_surface import LossSurface
from analysis.inference.bootstrap import Bootstrap
from analysis.inference.intervals import Interval
from analysis.laws.law import group_of
from analysis.tables.frames import Array, floats, keep
from analysis.tables.run_region import RunRegion, run_region
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
    # From the smallest size with the fewest tokens to the largest with the most.
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


@dataclass(frozen=True)
class _Exchange:
    """One variable of the law in exchange for loss, while the other one is equal in both arms.

    Attributes:
        ends: the least and the most of the variable that an arm was run with.
        loss: of amounts of the variable, at an amount of the one that is held.
        needed: the amount that reaches a loss, likewise.
    """

    quantity: str
    held: str
    remedy: str
    ends: Callable[[RunRegion], tuple[float, float]]
    loss: Callable[[LossSurface, float, Array], Array]
    needed: Callable[[LossSurface, float, float], Array]


_TOKENS = _Exchange(
    "tokens",
    "parameters",
    "add horizons so that the arms' losses overlap",
    lambda arm: arm.tokens,
    lambda surface, size, tokens: surface.loss(size, tokens),
    lambda surface, size, loss: surface.tokens(size, loss),
)
_PARAMETERS = _Exchange(
    "parameters",
    "tokens",
    "add sizes so that the arms' losses overlap",
    lambda arm: (float(arm.parameters[0]), float(arm.parameters[-1])),
    lambda surface, tokens, sizes: surface.loss(sizes, tokens),
    lambda surface, tokens, loss: surface.sizes(tokens, loss),
)


def data_multiplier(
    fit: Fit, replicates: Bootstrap, baseline: str, other: str
) -> Multiplier | Refusal:
    """Tokens the baseline needs over tokens the other arm needs, at equal size and equal loss."""
    return _exchanged(fit, replicates, (baseline, other), _TOKENS)


def parameter_multiplier(
    fit: Fit, replicates: Bootstrap, baseline: str, other: str
) -> Multiplier | Refusal:
    """Parameters the baseline needs over those the other arm needs, at equal tokens and loss."""
    return _exchanged(fit, replicates, (baseline, other), _PARAMETERS)


def _exchanged(
    fit: Fit, replicates: Bootstrap, pair: tuple[str, str], exchange: _Exchange
) -> Multiplier | Refusal:
    """The ratio at the middle of the losses that both arms reach inside what they were run with."""
    baseline, other = pair
    held = float(np.exp(np.log(floats(rows_of(fit, baseline), exchange.held)).mean()))
    reached = []
    for name in pair:
        ends = np.array(exchange.ends(run_region(rows_of(fit, name))))
        reached.append(exchange.loss(fit.surface(name), held, ends)[0])
    low = max(float(each.min()) for each in reached)
    high = min(float(each.max()) for each in reached)
    if low >= high:
        return Refusal(
            "R-REACH",
            f"at {held:.3g} {exchange.held} {other} and {baseline} reach no common loss",
            exchange.remedy,
        )
    # The middle in ln L, in which the law is fitted.
    loss = float(np.sqrt(low * high))

    def needed(theta: Array, name: str) -> Array:
        return exchange.needed(fit.surface(name, theta), held, loss)[:, 0]

    factor = ratio_interval(fit, replicates, pair, needed)
    if isinstance(factor, Refusal):
        return factor
    size = held if exchange.held == "parameters" else None
    return Multiplier(exchange.quantity, baseline, other, factor, loss, size)


def ratio_interval(
    fit: Fit,
    replicates: Bootstrap,
    pair: tuple[str, str],
    needed: Callable[[Array, str], Array],
) -> Interval | Refusal:
    """Interval of what the baseline needs over what the other arm needs.

    Args:
        fit: the law of both arms.
        replicates: its bootstrap.
        pair: baseline and other arm.
        needed: maps parameter vectors and an arm to what it needs, a number for each vector.
    """
    baseline, other = pair
    # The logarithm is symmetric in the arms: swapping them inverts the ratio and its interval.
    point, spread = (
        np.log(needed(theta, baseline)) - np.log(needed(theta, other))
        for theta in (fit.theta[None], replicates.theta)
    )
    interval = replicates.interval(float(point[0]), spread)
    if isinstance(interval, Refusal):
        return interval
    return interval.mapped(lambda value: float(np.exp(value)))


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
    factor = ratio_interval(
        fit, replicates, (baseline, other), lambda theta, name: _flops_for(fit, theta, name, loss)
    )
    if isinstance(factor, Refusal):
        return factor
    return Multiplier("training FLOPs", baseline, other, factor, loss, None)


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
