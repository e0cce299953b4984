"""Hoffmann's three approaches to the exponents of N*(C) and D*(C), each with its known bias.

Source: Hoffmann et al. 2203.15556, section 3. All three give exponents only where C = 6 N D; with
another cost use `analysis.compute_optimal.allocation`, which takes any cost.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.compute_optimal.isoflop import budgets, exponents, grid_bias
from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.cluster_robust import sandwich
from analysis.inference.intervals import Interval, slope_interval
from analysis.laws.catalog import CHINCHILLA
from analysis.tables.compute import FLOPS_PER_PARAMETER_TOKEN
from analysis.tables.frames import Array, floats, groups
from analysis.validity.checks import decay, exponent_sum
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

GRID = 200
LEAST_RUNS = 3
ENDS = 2
"""The smallest and largest winning sizes are dropped: their range is cut off by the data."""


@dataclass(frozen=True)
class Approach:
    """The result of one approach: exponents with intervals or a refusal, and warnings."""

    name: str
    parameters: Interval | Refusal
    tokens: Interval | Refusal
    warnings: tuple[Caveat, ...]


def all_three(rows: pd.DataFrame, estimator: Estimator | None = None) -> tuple[Approach, ...]:
    """All approaches on the rows of one arm; only the first uses points before the decay."""
    finished = rows[rows["decayed"].astype(bool)] if "decayed" in rows else rows
    assert isinstance(finished, pd.DataFrame)
    law = (estimator or Estimator()).fit(finished.reset_index(drop=True), CHINCHILLA)
    return envelope(rows), isoflop(finished, law), parametric(law)


def envelope(rows: pd.DataFrame) -> Approach:
    """Approach 1: the lowest training curve at each compute, and a regression through its sizes.

    Curves are interpolated in ln C inside their own range. Points of one run are one cluster.
    """
    name = "1, envelope of training curves"
    caveat = decay(rows)
    warnings = () if caveat is None else (caveat,)
    key = "trunk_id" if "trunk_id" in rows else "run_id"
    curves = []
    for _, part in groups(rows, [key, "parameters"]):
        part = part.sort_values("flops")
        if len(part) > 1:
            logs = np.log([floats(part, column) for column in ("flops", "loss_nats")])
            curves.append((float(np.log(floats(part, "parameters")[0])), *logs))
    winners = _winners(curves) if len(curves) >= LEAST_RUNS else np.empty((0, 2))
    if len(np.unique(winners[:, 1])) < LEAST_RUNS + ENDS:
        refused = Refusal(
            "R-UNDER",
            f"{len(curves)} training curves, of which {len(np.unique(winners[:, 1]))} sizes are "
            f"lowest somewhere; {LEAST_RUNS + ENDS} are needed",
            "keep checkpoints of more sizes",
        )
        return Approach(name, refused, refused, warnings)
    slope = _slope_by_size(winners)
    tokens = Interval(1 - slope.estimate, 1 - slope.high, 1 - slope.low, slope.method)
    return Approach(name, slope, tokens, warnings)


def isoflop(rows: pd.DataFrame, law: Fit | Refusal) -> Approach:
    """Approach 2: a parabola per budget; warns of the bias that a fitted law implies for it."""
    name = "2, isoFLOP parabolas"
    curves = budgets(rows)
    slopes = exponents(curves)
    if isinstance(slopes, Refusal):
        return Approach(name, slopes, slopes, ())
    warnings = [each.warning for each in curves if each.warning is not None]
    if isinstance(law, Fit):
        p = law.parameters
        total = p["alpha"] + p["beta"]
        # Hoffmann et al. 2203.15556, equation 4: N* = G (C / 6)^(beta / (alpha + beta)).
        scale = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / total)
        for each in curves:
            optimum = scale * (each.flops / FLOPS_PER_PARAMETER_TOKEN) ** (p["beta"] / total)
            caveat = grid_bias(each, p["alpha"], p["beta"], optimum)
            warnings += [caveat] if caveat is not None else []
    caveat = exponent_sum(slopes["parameters"].estimate, slopes["tokens"].estimate, 1.0)
    warnings += [caveat] if caveat is not None else []
    return Approach(name, slopes["parameters"], slopes["tokens"], tuple(warnings))


def parametric(law: Fit | Refusal) -> Approach:
    """Approach 3: beta / (alpha + beta) of the fitted law."""
    name = "3, parametric law"
    if isinstance(law, Refusal):
        return Approach(name, law, law, ())
    alpha, beta = law.parameters["alpha"], law.parameters["beta"]
    direction = np.zeros(len(law.theta))
    # Delta method: derivatives of beta / (alpha + beta); those of its complement are their
    # negatives.
    direction[law.form.labels.index("alpha")] = -beta / (alpha + beta) ** 2
    direction[law.form.labels.index("beta")] = alpha / (alpha + beta) ** 2
    spread = sandwich(law)
    size = spread.interval(beta / (alpha + beta), direction)
    tokens = spread.interval(alpha / (alpha + beta), -direction)
    return Approach(name, size, tokens, ())


def _winners(curves: list[tuple[float, Array, Array]]) -> Array:
    """(ln C, ln N of the lowest curve) where at least two curves can be compared."""
    ends = [curve[1][[0, -1]] for curve in curves]
    compute = np.linspace(min(end[0] for end in ends), max(end[1] for end in ends), GRID)
    # Infinite outside a curve's own range, so that no curve is extrapolated into winning.
    losses = np.stack([np.interp(compute, logs, loss, np.inf, np.inf) for _, logs, loss in curves])
    comparable = np.isfinite(losses).sum(axis=0) >= 2
    sizes = np.array([size for size, _, _ in curves])[losses.argmin(axis=0)]
    return np.stack([compute, sizes], axis=1)[comparable]


def _slope_by_size(winners: Array) -> Interval:
    """Slope of ln N on ln C; each size that wins somewhere is one point, at its middle compute."""
    # A size that wins on many compute values is still one training run.
    sizes = np.unique(winners[:, 1])[1:-1]
    middle = np.array([winners[winners[:, 1] == size, 0].mean() for size in sizes])
    over = f"the {len(sizes)} sizes that are lowest somewhere"
    return slope_interval(middle, sizes, over)
