"""IsoFLOP curves (Hoffmann et al. 2203.15556, approach 2): a parabola per budget, and its bias.

A parabola of L in ln N finds the optimum exactly only where both exponents of the law are equal
and the grid is centred (arXiv 2603.22339), so the bias that a law implies for a grid is computed.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.intervals import Interval, slope_interval, t_quantile
from analysis.tables.frames import Array, floats, groups
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

SAME_BUDGET = 1.10
LEAST_R2 = 0.5
LARGEST_SPAN = 4.0
LARGEST_OFFSET = 2.0


@dataclass(frozen=True)
class IsoFlopCurve:
    """One isoFLOP curve and the lowest point of its parabola.

    Attributes:
        points: sorted by size.
        curve: L = curve[0] x^2 + curve[1] x + curve[2], with x = ln N - `centre`.
        size: N at the minimum with its interval, or why there is none.
        warning: W-EDGE where the minimum is not bracketed.
    """

    flops: float
    points: pd.DataFrame
    curve: Array
    centre: float
    size: Interval | Refusal
    warning: Caveat | None

    def loss(self, sizes: Array) -> Array:
        """The parabola's loss [nats]."""
        return np.polyval(self.curve, np.log(sizes) - self.centre)

    @property
    def tokens(self) -> float:
        """D at the minimum, between the points that were run; NaN without one."""
        if isinstance(self.size, Refusal):
            return float("nan")
        sizes, tokens = floats(self.points, "parameters"), floats(self.points, "tokens")
        return float(np.exp(np.interp(np.log(self.size.estimate), np.log(sizes), np.log(tokens))))


def budgets(rows: pd.DataFrame) -> list[IsoFlopCurve]:
    """The isoFLOP curves of one arm: three sizes or more whose C agrees within a tenth."""
    rows = rows.sort_values("flops").reset_index(drop=True)
    # Budgets are runs of sorted compute that stay within a tenth of the first of them.
    logs, first = np.log(floats(rows, "flops")), 0
    place = np.zeros(len(rows), dtype=int)
    for index in range(1, len(rows)):
        first = index if logs[index] - logs[first] > np.log(SAME_BUDGET) else first
        place[index] = first
    parts = (part for _, part in groups(rows.assign(budget=place), ["budget"]))
    return [
        _budget(part.sort_values("parameters"))
        for part in parts
        if len(np.unique(floats(part, "parameters"))) >= 3
    ]


def _budget(points: pd.DataFrame) -> IsoFlopCurve:
    logs, y = np.log(floats(points, "parameters")), floats(points, "loss_nats")
    centre = float(logs.mean())
    flops = float(np.exp(np.log(floats(points, "flops")).mean()))
    curve = np.polyfit(logs - centre, y, 2)
    vertex = centre - curve[1] / (2 * curve[0]) if curve[0] > 0 else np.nan
    # Also true for NaN: a parabola that opens downwards has no minimum.
    if not logs[0] <= vertex <= logs[-1]:
        warning = Caveat("W-EDGE", f"no minimum between the sizes at {flops:.2g} FLOP")
        return IsoFlopCurve(flops, points, curve, centre, _unbracketed(flops), warning)
    sides = min(int((logs < vertex).sum()), int((logs > vertex).sum()))
    left = y - np.polyval(curve, logs - centre)
    r2 = 1.0 - float(left @ left) / float(((y - y.mean()) ** 2).sum())
    warning = None
    if sides < 2 or r2 < LEAST_R2:
        finding = f"at {flops:.2g} FLOP {sides} sizes on one side of the minimum, R2 {r2:.2f}"
        warning = Caveat("W-EDGE", finding)
    size = _vertex_interval(logs - centre, left, curve, centre)
    return IsoFlopCurve(flops, points, curve, centre, size, warning)


def _unbracketed(flops: float) -> Refusal:
    return Refusal(
        "R-REACH", f"no size minimises the loss at {flops:.2g} FLOP", "add sizes on both sides"
    )


def _vertex_interval(x: Array, left: Array, curve: Array, centre: float) -> Interval | Refusal:
    """N at the vertex; delta method on its logarithm, Student's t for the points left over."""
    freedom = len(x) - 3
    if freedom < 1:
        return Refusal(
            "R-UNDER", "three sizes determine a parabola and leave no residual", "add a fourth size"
        )
    design = np.stack([x**2, x, np.ones_like(x)], axis=1)
    covariance = np.linalg.inv(design.T @ design) * float(left @ left) / freedom
    # Derivatives of the vertex -b / 2a by a, b and c.
    gradient = np.array([curve[1] / (2 * curve[0] ** 2), -1 / (2 * curve[0]), 0.0])
    half = t_quantile(freedom) * float(np.sqrt(gradient @ covariance @ gradient))
    vertex = centre - float(curve[1] / (2 * curve[0]))
    method = f"delta method over {len(x)} sizes"
    return Interval(vertex, vertex - half, vertex + half, method).mapped(lambda v: float(np.exp(v)))


def exponents(curves: list[IsoFlopCurve]) -> dict[str, Interval] | Refusal:
    """Exponents of N*(C) and D*(C) from the bracketed minima, with t intervals."""
    usable = [
        (each, each.size)
        for each in curves
        if each.warning is None and isinstance(each.size, Interval)
    ]
    if len(usable) < 3:
        return Refusal(
            "R-UNDER",
            f"{len(usable)} budgets have a bracketed minimum with an interval, 3 are needed",
            "add sizes around the minimum, or budgets",
        )
    compute = np.log([curve.flops for curve, _ in usable])
    sizes = np.log([size.estimate for _, size in usable])
    tokens = np.log([curve.tokens for curve, _ in usable])
    over = f"{len(usable)} budgets"
    return {
        "parameters": slope_interval(compute, sizes, over),
        "tokens": slope_interval(compute, tokens, over),
    }


def token_bias(alpha: float, beta: float, log_sizes: Array) -> float:
    """Relative error of D* by a parabola, where L = E + A N^-alpha + B D^-beta and C = 6 N D.

    At any budget the reducible loss is a multiple of beta e^(-alpha x) + alpha e^(beta x), with
    x = ln(N/N*), so the error depends on exponents and grid alone.

    Args:
        alpha: exponent of N.
        beta: exponent of D.
        log_sizes: ln(N/N*) of the grid.
    """
    reducible = beta * np.exp(-alpha * log_sizes) + alpha * np.exp(beta * log_sizes)
    # At fixed C, ln D falls as ln N rises: ln(D / D*) is minus the vertex, which is at -b / 2a.
    curve = np.polyfit(log_sizes, reducible, 2)
    return float(np.expm1(curve[1] / (2 * curve[0])))


def grid_bias(budget: IsoFlopCurve, alpha: float, beta: float, optimum: float) -> Caveat | None:
    """W-A2BIAS: the grid spans more than 4x or is more than 2x off the law's optimum.

    Args:
        budget: one isoFLOP curve.
        alpha: exponent of N in the fitted law.
        beta: exponent of D.
        optimum: N* of the law at this budget.
    """
    logs = np.log(np.unique(floats(budget.points, "parameters")) / optimum)
    span = float(np.exp((logs[-1] - logs[0]) / 2))
    offset = float(np.exp(abs(logs[-1] + logs[0]) / 2))
    if span <= LARGEST_SPAN * (1 + 1e-9) and offset <= LARGEST_OFFSET * (1 + 1e-9):
        return None
    bias = 100 * token_bias(alpha, beta, logs)
    finding = (
        f"+-{span:.2g}x, {offset:.2g}x off centre: D* off by {bias:+.1f} % under the fitted law"
    )
    return Caveat("W-A2BIAS", finding)
