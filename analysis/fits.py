"""Estimation: from rows of a table to a fitted law, or to a refusal that says what is missing."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from analysis.frames import floats, keep
from analysis.laws import (
    Array,
    Form,
    Law,
    bind,
    group_of,
    log_loss,
    log_loss_and_jacobian,
)
from analysis.refusal import Refusal
from analysis.solver import Problem, polish, solve

WARNINGS = {
    "W-OPT": "fewer than three starts agree on the optimum",
    "W-COND": "some combination of parameters is hardly constrained",
    "W-E0": "the floor E is not identified; it may be zero",
}
STARTS_THAT_AGREE = 3
CONDITION_LIMIT = 1e3
CORRELATION_LIMIT = 0.99
LOG_LIKELIHOOD_UNITS = 2.0
SMALLEST_DELTA = 1e-6


@dataclass(frozen=True)
class Warned:
    """A reservation about a fit: its code and what was found."""

    code: str
    finding: str


@dataclass(frozen=True)
class Fit:
    """A fitted law; everything learnt is here, nothing is recomputed later.

    Attributes:
        theta: the parameter vector in the centred coordinates of `form`.
        sigma: residual standard deviation of ln L, robust, for the degrees of freedom left.
        starts_agreeing: starts that ended within 1e-6 of the best objective, of `starts`.
        condition: condition number of the Jacobian with columns of unit length.
    """

    form: Form
    rows: pd.DataFrame
    theta: Array
    delta: float
    objective: float
    sigma: float
    starts: int
    starts_agreeing: int
    condition: float
    warnings: tuple[Warned, ...]

    @property
    def law(self) -> Law:
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
        """Every parameter by its readable name, away from the centring (A and B at N = D = 1)."""
        found = {}
        for group in self.form.groups:
            for name, value in self.form.natural(self.theta, group).items():
                label = self.form.labels[self.form.slots[name, group]]
                found[label] = (
                    float(np.exp(value)) if is_coefficient(self.law, name) else float(value)
                )
        return found

    @cached_property
    def pivots(self) -> dict[str, dict[str, float]]:
        """Per group, each term's value at the centre of the data, in the unit of the loss."""
        return {group: self.form.pivots(self.theta, group) for group in self.form.groups}

    @cached_property
    def residuals(self) -> Array:
        """Observed minus fitted ln L, a value per row."""
        return observed(self.rows) - log_loss(self.form.design(self.rows), self.theta[None])[0]

    def predict(self, rows: pd.DataFrame) -> Array:
        """The fitted loss at each row, which needs the law's variables and group columns."""
        return np.exp(log_loss(self.form.design(rows), self.theta[None])[0])


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

    def fit(self, rows: pd.DataFrame, law: Law) -> Fit | Refusal:
        """Fit a law to rows with `loss_nats` and the law's variables, or say why not."""
        refusal = under_determined(rows, law)
        if refusal:
            return refusal
        form = bind(law, rows)
        design, y = form.design(rows), observed(rows)
        squares = Problem(design, y, np.ones(len(y)), np.inf)
        theta, reached = solve(squares, project_seeds(self, form, rows), self.tolerance)
        sigma = robust_sigma(y - log_loss(design, theta[[reached.argmin()]])[0], len(form.labels))
        delta = max(1.345 * sigma, SMALLEST_DELTA) if self.delta is None else self.delta
        problem = Problem(design, y, np.ones(len(y)), delta)
        # Continuation: the surface is smooth near least squares, full of kinks near delta = 0.
        for step in sorted({each for each in (0.1, 0.01, delta) if each >= delta}, reverse=True):
            theta, reached = solve(Problem(design, y, problem.weights, step), theta, self.tolerance)
        best, objective = polish(problem, theta[reached.argmin()])
        agreeing = int((reached <= objective * (1 + 1e-6) + 1e-18).sum())
        sigma = robust_sigma(y - log_loss(design, best[None])[0], len(form.labels))
        condition, free = _condition(design, best, form)
        warnings = _warnings(agreeing, condition, free)
        floor = _floor_warning(self, form, rows, (best, objective, sigma, delta))
        return Fit(
            form, rows, best, delta, objective, sigma, len(theta), agreeing, condition,
            tuple(warnings + floor),
        )  # fmt: skip


def fit(rows: pd.DataFrame, law: Law) -> Fit | Refusal:
    """Fit with the default estimator."""
    return Estimator().fit(rows, law)


def observed(rows: pd.DataFrame) -> Array:
    """Ln of the observed loss."""
    return np.log(floats(rows, "loss_nats"))


def is_coefficient(law: Law, name: str) -> bool:
    """Whether a parameter multiplies a term (and is fitted as a logarithm)."""
    return any(term.coefficient == name for term in law.terms)


def robust_sigma(residuals: Array, parameters: int) -> float:
    """Standard deviation from the median absolute residual, for the degrees of freedom left."""
    freedom = max(len(residuals) - parameters, 1)
    spread = 1.4826 * np.median(np.abs(residuals))
    return float(spread * np.sqrt(len(residuals) / freedom))


def under_determined(rows: pd.DataFrame, law: Law) -> Refusal | None:
    """Why these rows cannot determine this law, or None if they can."""
    if not len(rows):
        return Refusal("R-UNDER", "no decayed points yet", "wait for runs to finish")
    groups = np.array(group_of(rows, law.by))
    names = np.unique(groups)
    own_shape = bool(law.varies & {term.exponent for term in law.terms})
    samples = [keep(rows, groups == name) for name in names] if own_shape else [rows]
    parameters = sum(len(term.names) for term in law.terms)
    if not own_shape:
        parameters += (len(names) - 1) * len(law.varies)
    for sample in samples:
        refusal = _narrow(sample, law, parameters)
        if refusal:
            return refusal
    return None


def _narrow(rows: pd.DataFrame, law: Law, parameters: int) -> Refusal | None:
    if len(rows) < parameters + 3:
        return Refusal(
            "R-UNDER",
            f"{len(rows)} points for {parameters} parameters of the {law.name} law",
            f"finish at least {parameters + 3} runs",
        )
    for name in law.variables:
        distinct = len(np.unique(floats(rows, name)))
        if distinct < 3:
            return Refusal("R-UNDER", f"only {distinct} distinct values of {name}", "add a third")
    if {"parameters", "tokens"} <= set(law.variables):
        ratio = floats(rows, "tokens") / floats(rows, "parameters")
        spread = float(ratio.max() / ratio.min())
        if spread < 10:
            return Refusal(
                "R-UNDER",
                f"tokens per parameter spread only {spread:.1f}x, so size and data move together",
                "add horizons (10x is the least), or fit the power law in compute",
            )
    return None


def project_seeds(estimator: Estimator, form: Form, rows: pd.DataFrame) -> Array:
    """The best cells of a grid over exponents, coefficients by non-negative least squares."""
    design = form.design(rows)
    loss = floats(rows, "loss_nats")
    exponents = [term.exponent for term in form.law.terms if term.exponent]
    cells = np.stack(np.meshgrid(*[estimator.grid] * len(exponents), indexing="ij"), -1)
    cells = cells.reshape(-1, len(exponents))
    base = np.zeros((len(cells), len(form.labels)))
    for place, name in enumerate(exponents):
        slots = [slot for (owner, _), slot in form.slots.items() if owner == name]
        base[:, slots] = cells[:, [place]]
    coefficients = sorted(
        {slot for (name, _), slot in form.slots.items() if is_coefficient(form.law, name)}
    )
    misfit = np.empty(len(cells))
    for cell, start in enumerate(base):
        # Each coefficient multiplies the terms it belongs to; losses are relative, as ln L is.
        terms = np.exp(design @ start)
        columns = np.einsum("jn,jnk->nk", terms, design[:, :, coefficients])
        values, misfit[cell] = nnls(columns / loss[:, None], np.ones(len(loss)))
        start[coefficients] = np.log(np.maximum(values, 1e-4 * loss.mean()))
    return base[np.argsort(misfit, kind="stable")[: estimator.starts]]


def _condition(design: Array, theta: Array, form: Form) -> tuple[float, str]:
    """Condition number of the scaled Jacobian, and its loosest direction in words."""
    jacobian = log_loss_and_jacobian(design, theta[None])[1][0]
    lengths = np.linalg.norm(jacobian, axis=0)
    _, singular, right = np.linalg.svd(jacobian / np.maximum(lengths, 1e-300), full_matrices=False)
    condition = float(singular[0] / max(singular[-1], 1e-300))
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


def _warnings(agreeing: int, condition: float, free: str) -> list[Warned]:
    found = []
    if agreeing < STARTS_THAT_AGREE:
        found.append(Warned("W-OPT", f"{agreeing} starts agree on the optimum"))
    if free:
        found.append(Warned("W-COND", f"{free} is loose (condition {condition:.0f})"))
    return found


def _floor_warning(
    estimator: Estimator, form: Form, rows: pd.DataFrame, best: tuple[Array, float, float, float]
) -> list[Warned]:
    """Whether the data would accept a floor of zero: the profile's value at E = 0."""
    theta, objective, sigma, delta = best
    if all(term.coefficient != "E" for term in form.law.terms) or len(form.law.terms) < 2:
        return []
    share = min(form.pivots(theta, group)["E"] for group in form.groups)
    if share < 0.01 * float(floats(rows, "loss_nats").mean()):
        return [Warned("W-E0", "the floor went to zero")]
    without = bind(form.law.without("E"), rows)
    design, y = without.design(rows), observed(rows)
    starts = project_seeds(Estimator(grid=estimator.grid[::3], starts=4), without, rows)
    problem = Problem(design, y, np.ones(len(y)), delta)
    lowest = float(solve(problem, starts, 1e-10)[1].min())
    units = (lowest - objective) / max(sigma, 1e-12) ** 2
    if units < LOG_LIKELIHOOD_UNITS:
        return [Warned("W-E0", f"a floor of zero fits as well ({units:.1f} log-likelihood units)")]
    return []
