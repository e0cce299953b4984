"""Confidence intervals as values, and Student's t intervals over clusters.

The interval of a ratio of means is Fieller's (Fieller 1954, "Some Problems in Interval
Estimation").
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.tables.frames import Array
from analysis.validity.refusal import Refusal

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and how that was made."""

    estimate: float
    low: float
    high: float
    method: str

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the quantity."""
        return Interval(
            function(self.estimate), function(self.low), function(self.high), self.method
        )

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside the interval."""
        return not self.low <= value <= self.high


def t_interval(values: Array, clusters: str) -> Interval | Refusal:
    """Mean of one value per cluster with a t interval; `clusters` names them in the plural."""
    if len(values) < 2:
        return Refusal(
            "R-PAIRS",
            f"matched pairs at {len(values)} {clusters}, an interval needs 2",
            f"finish runs at more {clusters}",
        )
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = float(np.mean(values))
    method = f"t interval over {len(values)} {clusters}"
    return Interval(mean, mean - float(half), mean + float(half), method)


def slope_interval(x: Array, y: Array, points: str) -> Interval:
    """Slope of y on x by least squares with a t interval; `points` says what was regressed over."""
    slope, error = slope_and_error(x, y)
    half = t_quantile(len(x) - 2) * error
    return Interval(slope, slope - half, slope + half, f"regression over {points}")


def slope_and_error(x: Array, y: Array) -> tuple[float, float]:
    """Slope of y on x by least squares and its standard error, NaN for two points."""
    # Centred: with raw x the intercept takes the digits that the slope needs.
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    if len(x) < 3:
        return slope, float("nan")
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def ratio_interval(numerator: Array, denominator: Array) -> Interval | Refusal:
    """Fieller's interval for |mean of numerator / mean of denominator|, paired by cluster."""
    count = len(numerator)
    below = t_interval(denominator, "sizes")
    if isinstance(below, Refusal):
        return below
    if not below.excludes(0.0):
        return Refusal(
            "R-RATIO",
            "the interval of the architecture effect includes zero",
            "add seeds or sizes until the architecture effect has a sign",
        )
    x, y = float(np.mean(numerator)), float(np.mean(denominator))
    covariance = np.cov(numerator, denominator) / count
    t = t_quantile(count - 1)
    # Fieller: the ratios r for which mean(x - r y) is not significant solve a r^2 - 2 b r + c = 0.
    a = y**2 - t**2 * covariance[1, 1]
    b = x * y - t**2 * covariance[0, 1]
    c = x**2 - t**2 * covariance[0, 0]
    # a > 0 because the denominator's interval excludes zero: the interval is bounded.
    root = np.sqrt(max(b**2 - a * c, 0.0))
    ends = np.array([(b - root) / a, (b + root) / a])
    # Of the ratio's absolute value: an interval across zero starts at zero.
    low = 0.0 if ends[0] < 0 < ends[1] else float(np.abs(ends).min())
    return Interval(
        abs(x / y), low, float(np.abs(ends).max()), f"Fieller interval over {count} sizes"
    )


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return float(stats.t.ppf(0.5 + 0.5 * LEVEL, freedom))


def t_over_normal(freedom: int) -> float:
    """How much wider t intervals are than normal ones."""
    return t_quantile(max(freedom, 1)) / float(stats.norm.ppf(0.5 + 0.5 * LEVEL))
