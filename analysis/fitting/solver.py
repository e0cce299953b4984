"""Huber loss on ln L, a batched Levenberg-Marquardt solver, and a final polish.

The objective is the one of Hoffmann et al. 2203.15556 (approach 3), as a sum over rows: scipy's
stopping rules act as absolute limits on a mean of such small terms, and end the fit early (the
explanation that Besiroglu et al. 2404.10102 give for the published parameters).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from analysis.laws.bound import Design, log_loss, log_loss_and_slopes
from analysis.tables.frames import Array

MAX_ITERATIONS = 300
MAX_STEP = 1.5
BATCH_NUMBERS = 30_000
"""Residuals in one batch of replicates; larger batches fall out of the cache."""


@dataclass(frozen=True)
class Problem:
    """What is minimised: sum over rows of weight * Huber(prediction - y).

    Attributes:
        design: a law on its rows, from a Form.
        y: observed ln of the target, (rows,) or (replicates, rows).
        weights: (rows,) or (replicates, rows); bootstrap counts.
        delta: where the Huber loss turns linear; infinite for least squares.
    """

    design: Design
    y: Array
    weights: Array
    delta: float

    def objective(self, theta: Array) -> Array:
        """The objective at each parameter vector of theta (replicates, parameters)."""
        residuals = log_loss(self.design, theta) - self.y
        weights = np.broadcast_to(self.weights, residuals.shape)
        return (weights * huber(residuals, self.delta)).sum(axis=1)

    def objective_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Objective and analytic gradient of a problem with one replicate."""
        prediction, slopes = log_loss_and_slopes(self.design, vector[None])
        residuals = prediction[0] - self.y
        push = self.weights * np.clip(residuals, -self.delta, self.delta)
        total = float((self.weights * huber(residuals, self.delta)).sum())
        return total, slopes[0] @ push

    def expand(self, theta: Array) -> tuple[Array, Array, Array]:
        """Objective, gradient and Gauss-Newton matrix at each vector of theta."""
        prediction, slopes = log_loss_and_slopes(self.design, theta)
        residuals = prediction - self.y
        size = np.abs(residuals)
        inside = np.minimum(size, self.delta)
        value = 0.5 * inside**2 + (inside * (size - inside) if np.isfinite(self.delta) else 0.0)
        # Iteratively reweighted least squares: beyond delta a residual weighs delta / |r|.
        robust = self.weights * (inside / np.maximum(size, 1e-300))
        weighted = slopes * robust[:, None, :]
        gradient = np.matmul(weighted, residuals[:, :, None])[:, :, 0]
        # Gauss-Newton: without second derivatives of the law the matrix stays semidefinite.
        normal = np.matmul(weighted, slopes.transpose(0, 2, 1))
        return (np.broadcast_to(self.weights, value.shape) * value).sum(axis=1), gradient, normal

    def rows_of(self, replicates: Array) -> "Problem":
        """The same problem for some of its replicates."""
        y = self.y[replicates] if self.y.ndim == 2 else self.y
        weights = self.weights[replicates] if self.weights.ndim == 2 else self.weights
        return Problem(self.design, y, weights, self.delta)


def huber(residuals: Array, delta: float) -> Array:
    """Half the square inside delta, linear outside."""
    size = np.abs(residuals)
    inside = np.minimum(size, delta)
    # delta (|r| - delta / 2) = delta^2 / 2 + delta (|r| - delta): one expression for both sides.
    return 0.5 * inside**2 + (inside * (size - inside) if np.isfinite(delta) else 0.0)


def solve(problem: Problem, start: Array, tolerance: float) -> tuple[Array, Array]:
    """Minimise from each start (replicates, parameters); returns parameters and objectives.

    A replicate is done when a step lowers its objective by less than `tolerance`, relatively. Its
    objective is not finite where it could not be fitted.
    """
    theta, objective = start.copy(), np.empty(len(start))
    batch = max(1, BATCH_NUMBERS // problem.design.shape[0])
    for first in range(0, len(start), batch):
        part = np.arange(first, min(first + batch, len(start)))
        theta[part], objective[part] = _solve_batch(problem.rows_of(part), start[part], tolerance)
    return theta, objective


def _solve_batch(problem: Problem, start: Array, tolerance: float) -> tuple[Array, Array]:
    theta = start.copy()
    with np.errstate(all="ignore"):
        objective, gradient, normal = problem.expand(theta)
        damping = np.full(len(theta), 1e-3)
        active = np.flatnonzero(np.isfinite(objective))
        for _ in range(MAX_ITERATIONS):
            if not len(active):
                break
            # All replicates take a step at once; those that have converged drop out.
            proposal = theta[active] + _step(gradient[active], normal[active], damping[active])
            reached, slope, matrix = problem.rows_of(active).expand(proposal)
            gain = objective[active] - reached
            better = (gain > 0) & np.isfinite(matrix).all(axis=(1, 2))
            # Damping beyond 1e12 makes steps of rounding size: nothing more can be gained.
            done = (better & (gain <= tolerance * objective[active])) | (damping[active] > 1e12)
            moved = active[better]
            theta[moved], objective[moved] = proposal[better], reached[better]
            gradient[moved], normal[moved] = slope[better], matrix[better]
            damping[active] = np.maximum(damping[active] * np.where(better, 0.2, 8.0), 1e-12)
            active = active[~done]
    return theta, objective


def polish(problem: Problem, start: Array) -> tuple[Array, float]:
    """Lower one solution to the last digits with BFGS and L-BFGS-B, and keep the lowest."""
    scale = max(problem.objective_and_gradient(start)[0], 1e-300)

    def scaled(vector: Array) -> tuple[float, Array]:
        # Stopping rules of the optimisers are absolute: an objective near 1 makes them relative.
        with np.errstate(all="ignore"):
            value, gradient = problem.objective_and_gradient(vector)
        if not np.isfinite(value):
            return 1e30, np.zeros_like(vector)
        return value / scale, gradient / scale

    # BFGS first, L-BFGS-B from there: either alone stops early on some tables, the lowest wins.
    solutions = [start]
    for method, options in (
        ("BFGS", {"gtol": 1e-10}),
        ("L-BFGS-B", {"gtol": 1e-12, "ftol": 1e-16}),
    ):
        solutions.append(
            minimize(scaled, solutions[-1], jac=True, method=method, options=options).x
        )
    values = [problem.objective_and_gradient(vector)[0] for vector in solutions]
    best = int(np.nanargmin(values))
    return solutions[best], values[best]


def _step(gradient: Array, normal: Array, damping: Array) -> Array:
    diagonal = np.diagonal(normal, axis1=1, axis2=2)
    # The share of the trace keeps a vanished term (E = 0) from making the system singular.
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.sum(1, keepdims=True) + 1e-300
    normal = normal + ridge[:, :, None] * np.eye(normal.shape[1])
    # Parameters are exponents and logs: a step above 1.5 leaves the region where the law holds.
    return np.clip(-np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], -MAX_STEP, MAX_STEP)
