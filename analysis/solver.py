"""The numerical core: Huber loss on ln L, a batched Levenberg-Marquardt solver, a last polish."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from analysis.laws import Array, log_loss, log_loss_and_jacobian

MAX_ITERATIONS = 300
MAX_STEP = 1.5


@dataclass(frozen=True)
class Problem:
    """What is minimised: sum over rows of weight * Huber(ln L - y).

    Attributes:
        design: (terms, rows, parameters), from a Form.
        y: observed ln L, (rows,) or (replicates, rows).
        weights: (rows,) or (replicates, rows); bootstrap counts.
        delta: where the Huber loss turns linear; infinite for least squares.
    """

    design: Array
    y: Array
    weights: Array
    delta: float

    def objective(self, theta: Array) -> Array:
        """The objective at each parameter vector of theta (replicates, parameters)."""
        residuals = log_loss(self.design, theta) - self.y
        return (np.broadcast_to(self.weights, residuals.shape) * huber(residuals, self.delta)).sum(
            1
        )

    def objective_and_gradient(self, vector: Array) -> tuple[float, Array]:
        """Objective and analytic gradient of a problem with one replicate."""
        prediction, jacobian = log_loss_and_jacobian(self.design, vector[None])
        residuals = prediction[0] - self.y
        slope = self.weights * np.clip(residuals, -self.delta, self.delta)
        total = float((self.weights * huber(residuals, self.delta)).sum())
        return total, jacobian[0].T @ slope

    def rows_of(self, replicates: Array) -> "Problem":
        """The same problem for some of its replicates."""
        y = self.y[replicates] if self.y.ndim == 2 else self.y
        weights = self.weights[replicates] if self.weights.ndim == 2 else self.weights
        return Problem(self.design, y, weights, self.delta)


def huber(residuals: Array, delta: float) -> Array:
    """Half the square inside delta, linear outside."""
    size = np.abs(residuals)
    inside = np.minimum(size, delta)
    return 0.5 * inside**2 + (inside * (size - inside) if np.isfinite(delta) else 0.0)


def solve(problem: Problem, start: Array, tolerance: float) -> tuple[Array, Array]:
    """Minimise from each start (replicates, parameters); returns parameters and objectives.

    A replicate is done when a step lowers its objective by less than `tolerance`, relatively.
    """
    theta = start.copy()
    objective = problem.objective(theta)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    for _ in range(MAX_ITERATIONS):
        if not len(active):
            break
        part = problem.rows_of(active)
        proposal = theta[active] + _step(part, theta[active], damping[active])
        reached = part.objective(proposal)
        gain = objective[active] - reached
        better = gain > 0
        theta[active[better]] = proposal[better]
        done = (better & (gain <= tolerance * objective[active])) | (damping[active] > 1e12)
        objective[active[better]] = reached[better]
        damping[active] *= np.where(better, 0.2, 8.0)
        damping[active] = np.maximum(damping[active], 1e-12)
        active = active[~done]
    return theta, objective


def polish(problem: Problem, start: Array) -> tuple[Array, float]:
    """Lower one solution to the last digits with BFGS and L-BFGS-B, and keep the lowest."""
    scale = max(problem.objective_and_gradient(start)[0], 1e-300)

    def scaled(vector: Array) -> tuple[float, Array]:
        # Stopping rules of the optimisers are absolute: an objective near 1 makes them relative.
        value, gradient = problem.objective_and_gradient(vector)
        return value / scale, gradient / scale

    found = [start]
    for method, options in (
        ("BFGS", {"gtol": 1e-10}),
        ("L-BFGS-B", {"gtol": 1e-12, "ftol": 1e-16}),
    ):
        found.append(minimize(scaled, found[-1], jac=True, method=method, options=options).x)
    values = [problem.objective_and_gradient(vector)[0] for vector in found]
    best = int(np.nanargmin(values))
    return found[best], values[best]


def _step(problem: Problem, theta: Array, damping: Array) -> Array:
    prediction, jacobian = log_loss_and_jacobian(problem.design, theta)
    residuals = prediction - problem.y
    size = np.maximum(np.abs(residuals), 1e-300)
    robust = problem.weights * np.minimum(1.0, problem.delta / size)
    weighted = jacobian * robust[:, :, None]
    normal = np.matmul(weighted.transpose(0, 2, 1), jacobian)
    gradient = np.matmul(weighted.transpose(0, 2, 1), residuals[:, :, None])
    diagonal = np.diagonal(normal, axis1=1, axis2=2)
    # The share of the trace keeps a vanished term (E = 0) from making the system singular.
    ridge = damping[:, None] * diagonal + 1e-12 * diagonal.sum(1, keepdims=True) + 1e-300
    normal = normal + ridge[:, :, None] * np.eye(theta.shape[1])
    return np.clip(-np.linalg.solve(normal, gradient)[:, :, 0], -MAX_STEP, MAX_STEP)
