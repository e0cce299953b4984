"""Profile likelihoods: the misfit as one parameter is held at other values.

A symmetric interval of a floor or an exponent is misleading when the data accept a floor of zero.
The other parameters are refitted at each value, warm-started from its neighbour; the interval ends
where the misfit crosses the threshold, and is open where it never does. Ours: the threshold is that
of the cluster-robust t interval, not of a likelihood, as rows of a trunk are not independent.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from analysis.fitting.estimator import Fit
from analysis.fitting.solver import Problem, solve
from analysis.inference.cluster_robust import sandwich
from analysis.inference.intervals import LEVEL
from analysis.laws.bound import Design, log_loss_and_jacobian
from analysis.tables.frames import Array

FINER = 17
"""Points between the two that an end of the interval lies between."""
POINTS = 13
"""To each side of the optimum."""
HALF_WIDTHS = 6.0
"""Distance to each side that is searched, in half-widths of the plain interval."""
LARGEST_SPAN = 8.0
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Profile:
    """The misfit along one parameter.

    Attributes:
        values: the parameter, coefficients at the centre of the data.
        rise: squared t statistic of each value, in effect.
        low: lower end of the interval, or None where it is open.
        high: upper end, likewise.
    """

    label: str
    estimate: float
    values: Array
    rise: Array
    threshold: float
    low: float | None
    high: float | None

    def as_coefficient(self) -> "Profile":
        """The profile of exp of the quantity: E rather than ln E, at the centre of the data."""
        low = None if self.low is None else float(np.exp(self.low))
        high = None if self.high is None else float(np.exp(self.high))
        return replace(
            self, estimate=float(np.exp(self.estimate)), values=np.exp(self.values), low=low,
            high=high,
        )  # fmt: skip

    @property
    def words(self) -> str:
        """The interval in words, open ends named."""
        low = "no lower end" if self.low is None else f"{self.low:.4g}"
        high = "no upper end" if self.high is None else f"{self.high:.4g}"
        return f"{self.label} {self.estimate:.4g} [{low}, {high}]"


def profile(fit: Fit, label: str) -> Profile:
    """The profile of one parameter by its label, in the coordinates of the fit.

    The rise is scaled so that near the optimum it is the squared t statistic of the cluster-robust
    standard error: there both intervals agree, further out the profile follows the curve.
    """
    slot = fit.form.labels.index(label)
    error, freedom = sandwich(fit).error_and_freedom(np.eye(len(fit.theta))[[slot]])
    quantile = float(stats.t.ppf(0.5 + 0.5 * LEVEL, freedom[0]))
    span = min(HALF_WIDTHS * quantile * float(error[0]), LARGEST_SPAN)
    # Quadratic spacing: dense near the optimum, where the curve is a parabola to be followed.
    offsets = span * np.linspace(0.0, 1.0, POINTS) ** 2
    # Near the optimum the objective rises by curvature / 2 * offset^2; over `scale` that is (offset
    # / error)^2.
    scale = 0.5 * _curvature(fit, slot) * float(error[0]) ** 2
    sides = [_walk(fit, slot, fit.theta[slot] + sign * offsets) / scale for sign in (-1.0, 1.0)]
    ends = []
    for sign, side in zip((-1.0, 1.0), sides, strict=True):
        finer = _finer(offsets, side, quantile**2)
        rise = _walk(fit, slot, fit.theta[slot] + sign * finer) / scale
        ends.append(_crossing(finer, rise, quantile**2))
    log = any(slot == fit.form.slots.get((n, g)) for n in fit.law.logs for g in fit.form.groups)
    at = fit.theta[slot] + np.concatenate([-offsets[:0:-1], offsets])
    # The left side is reversed, and without the optimum, which both sides start from.
    result = Profile(
        label, float(fit.theta[slot]), at, np.concatenate([sides[0][:0:-1], sides[1]]),
        quantile**2,
        None if ends[0] is None else float(fit.theta[slot]) - ends[0],
        None if ends[1] is None else float(fit.theta[slot]) + ends[1],
    )  # fmt: skip
    return result.as_coefficient() if log else result


def _curvature(fit: Fit, slot: int) -> float:
    """Second derivative of the profiled objective at the optimum (Gauss-Newton)."""
    jacobian = log_loss_and_jacobian(fit.form.design(fit.rows), fit.theta[None])[1][0]
    # Clipped rows have no curvature in a Huber objective.
    inside = np.average(np.abs(fit.residuals) <= fit.delta, weights=fit.weights)
    normal = (jacobian * fit.weights[:, None]).T @ jacobian
    # One over the entry of the inverse is the Schur complement: the curvature once the other
    # parameters are refitted.
    return float(inside / np.linalg.pinv(normal)[slot, slot])


def _walk(fit: Fit, slot: int, values: Array) -> Array:
    """Growth of the objective with the parameter at each value, warm-started along the way."""
    free = np.delete(np.arange(len(fit.theta)), slot)
    start, rise = fit.theta[free], np.zeros(len(values))
    for place, value in enumerate(values):
        # Warm start from the neighbour: the profile stays in the valley of the optimum.
        theta, reached = solve(_held(fit.problem, slot, float(value)), start[None], TOLERANCE)
        start = theta[0]
        rise[place] = max(float(reached[0]) - fit.objective, 0.0)
    return rise


def _held(problem: Problem, slot: int, value: float) -> Problem:
    """The problem with one parameter held at a value, so that the solver sees the others.

    A parameter of one group is held in that group alone.
    """
    design, groups = problem.design, []
    for group in design.groups:
        held = {name: value for name, place in group.slots.items() if place == slot}
        slots = {n: place - (place > slot) for n, place in group.slots.items() if place != slot}
        groups.append(replace(group, slots=slots, held={**group.held, **held}))
    shape = (design.shape[0], design.shape[1] - 1)
    return replace(problem, design=Design(design.law, tuple(groups), design.fixed, shape))


def _finer(offsets: Array, rise: Array, threshold: float) -> Array:
    """The offsets up to the crossing, and many between the two that it lies between.

    Where the floor or a term has fallen to zero the misfit rises almost vertically, and a straight
    line over a whole step would miss the crossing.
    """
    inside = _last_inside(rise, threshold)
    if inside == len(rise) - 1:
        return offsets
    return np.concatenate(
        [offsets[:inside], np.linspace(offsets[inside], offsets[inside + 1], FINER)]
    )


def _last_inside(rise: Array, threshold: float) -> int:
    """The last place that belongs to the interval.

    A profile may dip again beyond its first crossing: a second valley belongs to the interval.
    """
    return int(np.flatnonzero(rise <= threshold)[-1])


def _crossing(offsets: Array, rise: Array, threshold: float) -> float | None:
    """Where the profile last crosses the threshold, by linear interpolation of its square root."""
    inside = _last_inside(rise, threshold)
    if inside == len(rise) - 1:
        return None
    # The root of a parabola is a straight line, so interpolating it is exact near the optimum.
    roots = np.sqrt(rise[inside : inside + 2])
    share = (np.sqrt(threshold) - roots[0]) / (roots[1] - roots[0])
    return float(offsets[inside] + share * (offsets[inside + 1] - offsets[inside]))
