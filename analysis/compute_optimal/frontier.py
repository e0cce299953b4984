"""Compute-optimal frontiers with bands, best sizes against compute, and loss contours.

Inside the data a band is the bootstrap's; beyond, it also includes the error of back-tests on the
same data. Frontiers end at ten times the largest compute. Ours: sizes are searched on a grid over
the counted cost, as no closed form holds for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.compute_optimal.isoflop import IsoFlopCurve, exponents, grid_bias
from analysis.fitting.estimator import Fit
from analysis.inference.backtest import BackTest
from analysis.inference.bootstrap import UNDEFINED_SHARE, Bootstrap
from analysis.inference.intervals import Interval
from analysis.laws.bound import log_loss
from analysis.laws.law import group_of
from analysis.tables.frames import Array, floats, keep
from analysis.tables.run_region import SizeCurve, flops_per_token, run_region
from analysis.validity.checks import exponent_sum
from analysis.validity.extrapolation import LARGEST_EXTRAPOLATION, RATIO_MARGIN
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

SIZES = 240
CURVE = 60
CONTOUR = 60


@dataclass(frozen=True)
class ArmFrontier:
    """One group of a fit: its rows, and what training on a token costs at a size."""

    rows: pd.DataFrame
    identity: dict[str, str]
    cost: SizeCurve


def arm_of(fit: Fit, group: str, convention: str = "flops") -> ArmFrontier:
    """A group with its training FLOPs per token, by one way of counting them."""
    rows = fit.rows
    if fit.law.by:
        rows = keep(rows, np.array(group_of(rows, fit.law.by)) == group)
    names = ("architecture", "corpus")
    return ArmFrontier(
        rows,
        {name: str(rows[name].iloc[0]) for name in names if name in rows},
        flops_per_token(rows, convention),
    )


@dataclass(frozen=True)
class BestSizes:
    """The size with the lowest loss at each compute, both (replicates, compute).

    Attributes:
        logs: ln of the size.
        interior: whether the size is an optimum, not the end of the allowed range.
    """

    logs: Array
    interior: Array


def best_sizes(fit: Fit, theta: Array, arm: ArmFrontier, compute: Array) -> BestSizes:
    """The best size at each compute, for each parameter vector of theta.

    D/N is kept within three times what was run: further out the optimum would rest on the law's
    tail. A size at that limit is the best one allowed, not an optimum.
    """
    rows = arm.rows
    ratios = floats(rows, "tokens") / floats(rows, "parameters")
    low, high = ratios.min() / RATIO_MARGIN, ratios.max() * RATIO_MARGIN
    sizes = floats(rows, "parameters")
    grid = np.geomspace(sizes.min(), sizes.max() * LARGEST_EXTRAPOLATION, SIZES)
    tokens = compute[:, None] / arm.cost(grid)
    inside = (tokens / grid >= low) & (tokens / grid <= high)
    points = pd.DataFrame({"parameters": np.tile(grid, len(compute)), "tokens": tokens.ravel()})
    design = fit.form.design(points.assign(flops=np.repeat(compute, SIZES), **arm.identity))
    # The first and the last allowed size of each compute; argmax finds the first True.
    first, last = inside.argmax(axis=1), SIZES - 1 - inside[:, ::-1].argmax(axis=1)
    best, interior = [], []
    for each in theta:
        loss = log_loss(design, each[None])[0].reshape(len(compute), SIZES)
        loss = np.where(inside, loss, np.inf)
        place = loss.argmin(axis=1)
        best.append(np.log(grid)[place])
        interior.append((place > first) & (place < last))
    return BestSizes(np.array(best), np.array(interior))


def frontier_with_band(
    fit: Fit, replicates: Bootstrap, group: str, tested: BackTest, rivals: list[Fit]
) -> pd.DataFrame:
    """Lowest fitted loss at each compute, with a band, to ten times the largest compute.

    Beyond the data the band includes the error of back-tests and the spread of the rival laws.
    """
    arm = arm_of(fit, group)
    flops, seen = floats(arm.rows, "flops"), run_region(arm.rows)
    compute = np.geomspace(flops.min(), flops.max() * LARGEST_EXTRAPOLATION, CURVE)
    logs = best_sizes(fit, fit.theta[None], arm, compute).logs[0]
    points = pd.DataFrame({"parameters": np.exp(logs), "flops": compute})
    points = points.assign(tokens=compute / arm.cost(np.exp(logs)), **arm.identity)
    design = fit.form.design(points)
    middle = log_loss(design, fit.theta[None])[0]
    drawn = log_loss(design, replicates.theta)
    low, high = (np.quantile(drawn, tail, axis=0) for tail in (0.025, 0.975))
    decades = np.maximum(np.log10(compute / flops.max()), 0.0)
    logs_of_rivals = [log_loss(each.form.design(points), each.theta[None])[0] for each in rivals]
    spread = np.where(decades > 0, np.ptp(np.stack([middle, *logs_of_rivals]), axis=0), 0.0)
    # 2 sqrt((rate decades)^2 + (spread / 2)^2), as in a forecast; without the noise of a run, since
    # the band is for the mean.
    growth = np.hypot(2.0 * tested.rate * decades, spread)
    return points.assign(
        loss_nats=np.exp(middle),
        low=np.exp(middle - np.hypot(replicates.stretch * np.maximum(middle - low, 0), growth)),
        high=np.exp(middle + np.hypot(replicates.stretch * np.maximum(high - middle, 0), growth)),
        inside=seen.was_run(np.exp(logs), floats(points, "tokens")) & (decades == 0.0),
    )


def optimal_sizes(fit: Fit, replicates: Bootstrap, group: str) -> pd.DataFrame:
    """N*(C) and D*(C) of the fitted law inside the data's compute, with percentile bands.

    Left out is a compute at which more than one draw of twenty has no optimum.
    """
    arm = arm_of(fit, group)
    flops = floats(arm.rows, "flops")
    compute = np.geomspace(flops.min(), flops.max(), 24)
    draws = np.vstack([fit.theta[None], replicates.theta[:100]])
    best = best_sizes(fit, draws, arm, compute)
    known = best.interior[0] & (best.interior.mean(axis=0) >= 1 - UNDEFINED_SHARE)
    compute, size, drawn = compute[known], best.logs[0, known], best.logs[1:, known]
    frame = pd.DataFrame({"flops": compute, "parameters": np.exp(size)}).assign(**arm.identity)
    tokens = compute / arm.cost(np.exp(size))
    ends = np.quantile(drawn, [0.025, 0.975], axis=0)
    for name, end in zip(("low", "high"), ends, strict=True):
        widened = np.exp(size + replicates.stretch * (end - size))
        frame[f"parameters_{name}"] = widened
        other = "high" if name == "low" else "low"
        # At a given compute a larger model sees fewer tokens, so the ends change places.
        frame[f"tokens_{other}"] = compute / arm.cost(widened)
    return frame.assign(tokens=tokens)


def budget_warnings(curves: list[IsoFlopCurve], fit: Fit | None) -> Iterator[Caveat]:
    """Warnings about the isoFLOP curves of one arm, given the law fitted to it.

    The bias of a grid needs the law's own optimum; the sum of exponents is held against what the
    accountant's cost of a token implies along the same minima.
    """
    yield from (each.warning for each in curves if each.warning is not None)
    if fit is None:
        return
    arm = arm_of(fit, fit.form.groups[0])
    compute = np.array([each.flops for each in curves])
    best = best_sizes(fit, fit.theta[None], arm, compute)
    for each, log, known in zip(curves, best.logs[0], best.interior[0], strict=True):
        p = fit.parameters
        caveat = grid_bias(each, p["alpha"], p["beta"], float(np.exp(log))) if known else None
        if caveat is not None:
            yield caveat
    slopes = exponents(curves)
    if isinstance(slopes, Refusal):
        return
    ends = np.array([compute.min(), compute.max()])
    size, tokens = slopes["parameters"].estimate, slopes["tokens"].estimate
    usable = next(each.size for each in curves if isinstance(each.size, Interval))
    sizes = usable.estimate * (ends / ends[0]) ** size
    # Along the minima D = C / cost(N), whose exponent is 1 only if the cost is 6 N.
    implied = size + float(np.diff(np.log(ends / arm.cost(sizes)))[0] / np.diff(np.log(ends))[0])
    caveat = exponent_sum(size, tokens, implied)
    if caveat is not None:
        yield caveat


@dataclass(frozen=True)
class SizeExponent:
    """The exponent a of N* ~ C^a: of the fit, and of each bootstrap replicate."""

    value: float
    drawn: Array


def size_exponent(fit: Fit, replicates: Bootstrap, group: str, convention: str) -> SizeExponent:
    """Slope of ln N* in ln C over the data's compute by one way of counting C.

    Not a number where a draw has no optimum between the sizes.
    """
    arm = arm_of(fit, group, convention)
    flops = floats(arm.rows, convention)
    # Without the ends of the range, where the best size is often the largest or smallest allowed.
    compute = np.exp(np.quantile(np.log(flops), [0.15, 0.85]))
    span = float(np.log(compute[1] / compute[0]))
    values = []
    for theta in (fit.theta[None], replicates.theta[:100]):
        best = best_sizes(fit, theta, arm, compute)
        slope = (best.logs[:, 1] - best.logs[:, 0]) / span
        values.append(np.where(best.interior.all(axis=1), slope, np.nan))
    return SizeExponent(float(values[0][0]), values[1])


def contours(fit: Fit, group: str) -> pd.DataFrame:
    """Fitted loss over (N, D), not a number where nothing near was run."""
    arm = arm_of(fit, group)
    seen = run_region(arm.rows)
    sizes = seen.grid()
    tokens = np.geomspace(*seen.tokens, CONTOUR)
    n, d = (each.ravel() for each in np.meshgrid(sizes, tokens))
    points = pd.DataFrame({"parameters": n, "tokens": d, "flops": seen.cost(n) * d})
    loss = np.exp(log_loss(fit.form.design(points.assign(**arm.identity)), fit.theta[None])[0])
    return points.assign(loss_nats=np.where(seen.was_run(n, d), loss, np.nan), **arm.identity)
