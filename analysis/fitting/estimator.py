"""Fit a law to the rows of a table, or refuse and say what the table lacks.

The objective is the Huber loss on ln L of Hoffmann et al. 2203.15556, equation 3. Ours: its delta
follows from the residuals of a least-squares pass, the path from there to small deltas, and the
conditions under which a fit is refused or called poorly determined.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.fitting.loss_surface import LossSurface, surface_of
from analysis.fitting.solver import Problem, polish, solve
from analysis.fitting.starts import seeds
from analysis.laws.bound import AnyLaw, Form, bind, log_loss, log_loss_and_jacobian
from analysis.laws.law import Law, group_of
from analysis.tables.frames import Array, floats, keep
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

STARTS_THAT_AGREE = 3
CONDITION_LIMIT = 1e3
CORRELATION_LIMIT = 0.99
LOG_LIKELIHOOD_UNITS = 2.0
SMALLEST_DELTA = 1e-6
COARSE_TOLERANCE = 1e-6
HALF = 0.5 - 1e-12


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        theta: the parameter vector in the centred coordinates of `form`.
        weights: how often each row counts, as in a bootstrap.
        sigma: residual standard deviation of ln L, robust, for the degrees of freedom left.
        starts_agreeing: starts that ended within 1e-6 of the best objective, of `starts`.
        condition: condition number of the Jacobian with columns of unit length.
    """

    form: Form
    rows: pd.DataFrame
    weights: Array
    theta: Array
    delta: float
    objective: float
    sigma: float
    starts: int
    starts_agreeing: int
    condition: float
    warnings: tuple[Caveat, ...]

    @property
    def law(self) -> AnyLaw:
        """The functional form."""
        return self.form.law

    @property
    def codes(self) -> frozenset[str]:
        """Codes of the warnings."""
        return frozenset(warned.code for warned in self.warnings)

    @property
    def status(self) -> str:
        """`ok`, or the codes of its warnings."""
        return " ".join(sorted(self.codes)) or "ok"

    @cached_property
    def parameters(self) -> dict[str, float]:
        """Every parameter by its label; coefficients at N = D = 1, as papers report them."""
        labelled = {}
        for group in self.form.groups:
            for name, value in self.form.natural(self.theta, group).items():
                # Parameters held fixed have no slot: they were not estimated, so they are not
                # reported.
                if (name, group) not in self.form.slots:
                    continue
                label = self.form.labels[self.form.slots[name, group]]
                labelled[label] = float(np.exp(value) if name in self.law.logs else value)
        return labelled

    @cached_property
    def pivots(self) -> dict[str, dict[str, float]]:
        """Per group, each term's value at the centre of the data, in the unit of the loss."""
        return {group: self.form.pivots(self.theta, group) for group in self.form.groups}

    @cached_property
    def residuals(self) -> Array:
        """Observed minus fitted ln L, a value per row."""
        fitted = log_loss(self.form.design(self.rows), self.theta[None])[0]
        return observed(self.rows, self.law) - fitted

    @property
    def problem(self) -> Problem:
        """What was minimised."""
        y = observed(self.rows, self.law)
        return Problem(self.form.design(self.rows), y, self.weights, self.delta)

    def predict(self, rows: pd.DataFrame) -> Array:
        """The fitted target at each row, which needs the law's columns and groups."""
        return np.exp(log_loss(self.form.design(rows), self.theta[None])[0])

    def surface(self, group: str, theta: Array | None = None) -> LossSurface:
        """One group's loss over parameters and tokens, with its inverses.

        `theta` holds other parameter vectors (replicates, parameters), as those of a bootstrap.
        """
        return surface_of(self.form, self.theta[None] if theta is None else theta, group)


@dataclass(frozen=True)
class Estimator:
    """How a law is fitted to the ln of the losses.

    Attributes:
        delta: where the Huber loss turns linear; None for 1.345 robust standard deviations of a
            first least-squares pass, infinity for least squares.
        grid: exponents tried on each side by the variable projection.
        starts: grid cells that are optimised.
        tolerance: relative gain at which a start is done.
    """

    delta: float | None = None
    grid: Array = field(default_factory=lambda: np.geomspace(0.03, 1.3, 24))
    starts: int = 12
    tolerance: float = 1e-13

    def fit(self, rows: pd.DataFrame, law: AnyLaw, weights: Array | None = None) -> Fit | Refusal:
        """Fit a law to rows with its target and its columns, or say why not.

        Each row counts `weights` times, or once if they are not given.
        """
        refusal = under_determined(rows, law)
        if refusal:
            return refusal
        form = bind(law, rows)
        weights = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
        # Least squares first: it is smooth, and its residuals give the scale for delta.
        squares = Problem(form.design(rows), observed(rows, law), weights, np.inf)
        start = seeds(form, rows, self.grid, self.starts)
        theta, reached = solve(squares, start, COARSE_TOLERANCE)
        delta = self.delta
        if delta is None:
            left = squares.y - log_loss(squares.design, theta[[np.nanargmin(reached)]])[0]
            # 1.345 standard deviations: 95 % efficient for normal errors, robust for the rest.
            delta = max(1.345 * robust_sigma(left, weights, len(form.labels)), SMALLEST_DELTA)
        problem = replace(squares, delta=delta)
        # Continuation: the surface is smooth near least squares, full of kinks near delta = 0.
        for step in (each for each in (0.1, 0.01) if each > delta):
            theta, reached = solve(replace(problem, delta=step), theta, COARSE_TOLERANCE)
        # Continuation leads every start into one valley; the starts themselves see the others.
        return self._finish(form, rows, problem, np.concatenate([theta, start]))

    def _finish(
        self, form: Form, rows: pd.DataFrame, problem: Problem, start: Array
    ) -> Fit | Refusal:
        delta = problem.delta
        theta, reached = solve(problem, start, self.tolerance)
        if not np.isfinite(reached).any():
            return Refusal(
                "R-UNDER",
                f"the fit of the {form.law.name} law is not finite from any starting point",
                "check the columns for zeros and impossible values",
            )
        best, objective = polish(problem, theta[np.nanargmin(reached)])
        # The absolute term is for exact fits, whose objective is zero up to rounding.
        agreeing = int((reached <= objective * (1 + 1e-6) + 1e-18).sum())
        left = problem.y - log_loss(problem.design, best[None])[0]
        sigma = robust_sigma(left, problem.weights, len(form.labels))
        condition, free = _condition(problem, best, form)
        fitted = Fit(
            form, rows, problem.weights, best, delta, objective, sigma, len(theta), agreeing,
            condition, tuple(_warnings(agreeing, condition, free)),
        )  # fmt: skip
        return replace(fitted, warnings=(*fitted.warnings, *_floor_warning(self, fitted)))


def fit(rows: pd.DataFrame, law: AnyLaw) -> Fit | Refusal:
    """Fit with the default estimator."""
    return Estimator().fit(rows, law)


def observed(rows: pd.DataFrame, law: AnyLaw) -> Array:
    """Ln of the observed target of a law."""
    return np.log(floats(rows, law.target))


def robust_sigma(residuals: Array, weights: Array, parameters: int) -> float:
    """Standard deviation from the median absolute residual, for the degrees of freedom left."""
    count = float(weights.sum())
    size = np.abs(residuals)
    order = np.argsort(size, kind="stable")
    mass = np.cumsum(weights[order])
    # The lower and the upper median agree with those of rows that are written out twice.
    low, high = (size[order][np.searchsorted(mass, count * half)] for half in (HALF, 1 - HALF))
    # 1.4826 = 1 / 0.6745: the median of |r| is 0.6745 standard deviations for normal r.
    return float(1.4826 * 0.5 * (low + high) * np.sqrt(count / max(count - parameters, 1.0)))


def under_determined(rows: pd.DataFrame, law: AnyLaw) -> Refusal | None:
    """Why these rows cannot determine this law, or None if they can."""
    if not len(rows):
        return Refusal("R-UNDER", "no decayed points yet", "wait for runs to finish")
    groups = np.array(group_of(rows, law.by))
    names = np.unique(groups)
    own_shape = bool(law.varies & set(law.exponents))
    # Arms with exponents of their own share nothing but the floor: each must carry its own law.
    samples = {f" for {name}": keep(rows, groups == name) for name in names}
    if not own_shape or len(names) == 1:
        samples = {"": rows}
    parameters = len(law.parameters) - len(law.fixed)
    if not own_shape:
        parameters += (len(names) - 1) * len(law.varies)
    for whose, sample in samples.items():
        refusal = _narrow(sample, law, parameters)
        if refusal:
            remedy = refusal.remedy + (", or leave this arm out" if whose else "")
            return replace(refusal, reason=refusal.reason + whose, remedy=remedy)
    return None


def _narrow(rows: pd.DataFrame, law: AnyLaw, parameters: int) -> Refusal | None:
    if len(rows) < parameters + 3:
        return Refusal(
            "R-UNDER",
            f"{len(rows)} points for {parameters} parameters of the {law.name} law",
            f"finish at least {parameters + 3} runs",
        )
    for name in law.columns:
        distinct = len(np.unique(floats(rows, name)))
        # Two values of a variable leave its exponent and the floor indistinguishable.
        if distinct < 3:
            return Refusal("R-UNDER", f"only {distinct} distinct values of {name}", "add a third")
    if {"parameters", "tokens"} <= set(law.columns):
        ratio = floats(rows, "tokens") / floats(rows, "parameters")
        spread = float(ratio.max() / ratio.min())
        if spread < 10:
            return Refusal(
                "R-UNDER",
                f"tokens per parameter spread only {spread:.1f}x, so size and data move together",
                "add horizons (10x is the least), or fit the power law in compute",
            )
    return None


def _condition(problem: Problem, theta: Array, form: Form) -> tuple[float, str]:
    """Condition number of the scaled Jacobian, and its loosest direction in words."""
    jacobian = log_loss_and_jacobian(problem.design, theta[None])[1][0]
    jacobian = jacobian * np.sqrt(problem.weights)[:, None]
    lengths = np.linalg.norm(jacobian, axis=0)
    # Columns of unit length: otherwise the condition number would depend on the units.
    _, singular, right = np.linalg.svd(jacobian / np.maximum(lengths, 1e-300), full_matrices=False)
    condition = float(singular[0] / max(singular[-1], 1e-300))
    # The last right singular vector is the direction in which the misfit changes least.
    strongest = np.argsort(-np.abs(right[-1]))[:2]
    correlation = _largest_correlation(jacobian / np.maximum(lengths, 1e-300))
    free = " against ".join(form.labels[slot] for slot in strongest)
    if condition > CONDITION_LIMIT or correlation > CORRELATION_LIMIT:
        return condition, free
    return condition, ""


def _largest_correlation(scaled: Array) -> float:
    covariance = np.linalg.pinv(scaled.T @ scaled)
    deviation = np.sqrt(np.maximum(np.diagonal(covariance), 1e-300))
    correlation = np.abs(covariance / np.outer(deviation, deviation))
    return float((correlation - np.eye(len(correlation))).max())


def _warnings(agreeing: int, condition: float, free: str) -> list[Caveat]:
    caveats = []
    if agreeing < STARTS_THAT_AGREE:
        caveats.append(Caveat("W-OPT", f"{agreeing} starts agree on the optimum"))
    if free:
        caveats.append(Caveat("W-COND", f"{free} is poorly determined (condition {condition:.0f})"))
    return caveats


def _floor_warning(estimator: Estimator, fitted: Fit) -> list[Caveat]:
    """Whether the data accept a floor of zero: the profile likelihood at E = 0."""
    law, rows = fitted.law, fitted.rows
    if not isinstance(law, Law) or law.floor is None or law.fixed:
        return []
    share = min(pivot[law.floor] for pivot in fitted.pivots.values())
    if share < 0.01 * float(floats(rows, law.target).mean()):
        return [Caveat("W-E0", "the floor went to zero")]
    # The law without a floor has an optimum of its own, so it is fitted from its own starts.
    without = bind(law.without_floor(), rows)
    starts = seeds(without, rows, estimator.grid[::3], 4)
    problem = replace(fitted.problem, design=without.design(rows))
    lowest = float(np.nanmin(solve(problem, starts, 1e-10)[1]))
    # Objectives are in squared ln L; over sigma^2 they are log-likelihood units.
    units = (lowest - fitted.objective) / max(fitted.sigma, 1e-12) ** 2
    if units < LOG_LIKELIHOOD_UNITS:
        return [Caveat("W-E0", f"a floor of zero fits as well ({units:.1f} log-likelihood units)")]
    return []
