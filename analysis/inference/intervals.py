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


@dataclass(frozen=True)
class SharedError:
    """A standard error that all clusters share, so that it does not average out over them.

    Attributes:
        of: what it comes from, in the plural.
        count: how many of them; None for one more than the degrees of freedom.
    """

    error: float
    freedom: int
    of: str
    count: int | None = None

    @property
    def source(self) -> str:
        """What it comes from, with their number."""
        return f"{self.freedom + 1 if self.count is None else self.count} {self.of}"


def t_interval(values: Array, clusters: str, *shared: SharedError | None) -> Interval | Refusal:
    """Mean of one value per cluster with a t interval; `clusters` names them in the plural.

    With errors that the clusters share the variances add up, at Satterthwaite's degrees of
    freedom. What is not shared of them is in the scatter between clusters already, so the interval
    is a little too wide rather than too narrow.
    """
    if len(values) < 2:
        return Refusal(
            "R-PAIRS",
            f"matched pairs at {len(values)} {clusters}, an interval needs 2",
            f"finish runs at more {clusters}",
        )
    own, freedom = float(np.var(values, ddof=1)) / len(values), float(len(values) - 1)
    known = [each for each in shared if each is not None]
    total = own + sum(each.error**2 for each in known)
    if known and total:
        rest = sum(each.error**4 / each.freedom for each in known)
        freedom = total**2 / (own**2 / freedom + rest)
    sources = [f"{len(values)} {clusters}", *(each.source for each in known)]
    method = f"t interval over {', '.join(sources[:-1])}{' and ' * bool(known)}{sources[-1]}"
    half = t_quantile(freedom) * float(np.sqrt(total))
    mean = float(np.mean(values))
    return Interval(mean, mean - half, mean + half, method)


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


def ratio_interval(
    numerator: Array, denominator: Array, shared: Array | None = None
) -> Interval | Refusal:
    """Fieller's interval for |mean of numerator / mean of denominator|, paired by cluster.

    Args:
        numerator: one value per cluster.
        denominator: the same.
        shared: covariance (2, 2) of the two means that all clusters share; None for none.
    """
    count = len(numerator)
    known = None if shared is None else SharedError(float(np.sqrt(shared[1, 1])), count - 1, "")
    below = t_interval(denominator, "sizes", known)
    if isinstance(below, Refusal):
        return below
    if not below.excludes(0.0):
        return Refusal(
            "R-RATIO",
            "the interval of the architecture effect includes zero",
            "add seeds or sizes until the architecture effect has a sign",
        )
    x, y = float(np.mean(numerator)), float(np.mean(denominator))
    covariance = np.cov(numerator, denominator) / count + (0.0 if shared is None else shared)
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


def t_quantile(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return float(stats.t.ppf(0.5 + 0.5 * LEVEL, freedom))


def t_over_normal(freedom: int) -> float:
    """How much wider t intervals are than normal ones."""
    return t_quantile(max(freedom, 1)) / float(stats.norm.ppf(0.5 + 0.5 * LEVEL))
