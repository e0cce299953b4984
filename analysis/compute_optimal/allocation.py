"""Compute-optimal allocation: the lowest loss of a budget, or the cheapest way to a loss.

A cost is any function of (parameters, tokens), in FLOPs or in seconds: with attention, scans or
structured matrices C = 6 N D is wrong, and so is the closed form of Hoffmann et al. 2203.15556 that
rests on it. So the optimum is found numerically over the counted cost; with tokens to serve the
objective is that of Sardana et al. 2401.00448.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.fitting.estimator import Fit
from analysis.inference.bootstrap import Bootstrap
from analysis.inference.intervals import Interval
from analysis.tables.frames import Array
from analysis.tables.run_region import SizeCurve
from analysis.validity.refusal import Refusal

Cost = Callable[[Array, Array], Array]
"""(parameters, tokens) -> what a run costs, rising in tokens."""
SIZES = 200
LOG_TOKENS = (0.0, 80.0)
BISECTIONS = 60
FINE = 21
REFINEMENTS = 3


@dataclass(frozen=True)
class Ladder:
    """A cost from what a token costs at the sizes that were counted, and never beyond them.

    Raises:
        ValueError: fewer than two sizes were counted.
    """

    per_token: SizeCurve

    def __post_init__(self) -> None:
        if len(self.per_token.sizes) < 2:
            raise ValueError(
                f"a ladder of {len(self.per_token.sizes)} size cannot be interpolated; count at "
                "least two rungs"
            )

    def __call__(self, parameters: Array, tokens: Array) -> Array:
        """The cost of a run.

        Raises:
            ValueError: a size lies outside the ladder.
        """
        low, high = self.per_token.sizes[[0, -1]]
        sizes = np.asarray(parameters, dtype=np.float64)
        if sizes.min() < low * (1 - 1e-9) or sizes.max() > high * (1 + 1e-9):
            raise ValueError(
                f"sizes from {sizes.min():.3g} to {sizes.max():.3g} were asked for, the ladder "
                f"counts {low:.3g} to {high:.3g}; count more rungs"
            )
        return self.per_token(sizes) * np.asarray(tokens, dtype=np.float64)


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent.

    Attributes:
        parameters: best size, with its interval over bootstrap replicates if they were given.
        tokens: training tokens at that size.
        loss: fitted loss there.
        cost: of training and of the tokens served.
    """

    parameters: float
    tokens: float
    loss: float
    cost: float
    size_interval: Interval | Refusal | None = None


@dataclass(frozen=True)
class Question:
    """What is optimised for one group of a fit.

    Attributes:
        cost: of training.
        sizes: the smallest and the largest size to consider.
        serving: cost of one served token at a size; free if not given.
        served: tokens to be served over the model's life.
    """

    fit: Fit
    group: str
    cost: Cost
    sizes: tuple[float, float]
    serving: Callable[[Array], Array] | None = None
    served: float = 0.0

    def overhead(self, sizes: Array) -> Array:
        """What serving costs at each size."""
        if self.serving is None:
            return np.zeros_like(sizes)
        return self.serving(sizes) * self.served


def allocate(
    question: Question, budget: float, replicates: Bootstrap | None = None
) -> Allocation | Refusal:
    """Size and tokens with the lowest fitted loss that training and serving within a budget allow.

    Refused where the best size is at the end of the range: the optimum may lie beyond it.
    """
    point = _best_size(question, question.fit.theta, budget)
    if isinstance(point, Refusal):
        return point
    size, tokens = point, _tokens_for_budget(question, np.array([point]), budget)[0]
    loss = question.fit.surface(question.group).loss(size, tokens)[0, 0]
    interval = None
    if replicates is not None:
        sizes = [_best_size(question, theta, budget) for theta in replicates.theta]
        logs = np.array([np.nan if isinstance(n, Refusal) else np.log(n) for n in sizes])
        interval = replicates.interval(float(np.log(size)), logs)
        if isinstance(interval, Interval):
            interval = interval.mapped(lambda value: float(np.exp(value)))
    return Allocation(float(size), float(tokens), float(loss), budget, interval)


def cheapest(question: Question, loss: float) -> Allocation | Refusal:
    """The size whose training and serving together reach a loss at the least cost.

    With many tokens to serve the best model is smaller and trained longer (Sardana 2401.00448).
    """
    surface = question.fit.surface(question.group)

    def total(sizes: Array) -> Array:
        tokens = surface.tokens(sizes, loss)[0]
        reached = np.isfinite(tokens)
        # The cost is evaluated at finite tokens only; sizes that do not reach the loss are dropped
        # below.
        training = question.cost(sizes, np.where(reached, np.maximum(tokens, 1.0), 1.0))
        spent = training + question.overhead(sizes)
        return np.where(reached, np.log(spent), np.inf)

    size = _lowest(total, question.sizes, f"loss {loss:.3g}")
    if isinstance(size, Refusal):
        return size
    tokens = float(surface.tokens(size, loss)[0, 0])
    return Allocation(size, tokens, loss, float(np.exp(total(np.array([size]))[0])))


def _best_size(question: Question, theta: Array, budget: float) -> float | Refusal:
    surface = question.fit.surface(question.group, theta[None])

    def loss(sizes: Array) -> Array:
        tokens = _tokens_for_budget(question, sizes, budget)
        # Bisection starts at one token and stays there where not even one is affordable.
        affordable = tokens > 1.0
        fitted = surface.loss(sizes, np.maximum(tokens, 1.0))[0]
        return np.where(affordable, fitted, np.inf)

    return _lowest(loss, question.sizes, f"a budget of {budget:.3g}")


def _lowest(
    value: Callable[[Array], Array], ends: tuple[float, float], what: str
) -> float | Refusal:
    """Where a function of size is lowest between two sizes, unless that is at an end."""
    sizes = np.geomspace(*ends, SIZES)
    values = value(sizes)
    best = int(np.argmin(values))
    if not np.isfinite(values[best]):
        return Refusal(
            "R-REACH",
            f"no size in the range is possible for {what}",
            "raise the budget or the loss",
        )
    # At an end of the range the true optimum may lie outside it.
    if best in (0, SIZES - 1):
        return Refusal(
            "R-REACH",
            f"for {what} the best size is at the end of the range, {sizes[best]:.3g}",
            "widen the range of sizes that are counted",
        )
    # Each round keeps two of twenty intervals, so the bracket shrinks tenfold.
    for _ in range(REFINEMENTS):
        low, high = sizes[max(best - 1, 0)], sizes[min(best + 1, len(sizes) - 1)]
        sizes = np.geomspace(low, high, FINE)
        values = value(sizes)
        best = int(np.argmin(values))
    return float(sizes[best])


def _tokens_for_budget(question: Question, sizes: Array, budget: float) -> Array:
    """Training tokens that the budget leaves at each size, by bisection on the counted cost."""
    left = budget - question.overhead(sizes)
    # Bisection in ln D: a cost is any rising function of tokens and need not be invertible.
    low, high = (np.full(len(sizes), end) for end in LOG_TOKENS)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        dear = question.cost(sizes, np.exp(middle)) > left
        low, high = np.where(dear, low, middle), np.where(dear, middle, high)
    return np.exp(low)
