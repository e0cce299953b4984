"""Intervals inside the data that do not take the law's shape for granted.

A law that is a little wrong is biased between its points too, by about half a standard error of
Chinchilla's law in synthetic studies, and its own standard error does not see that. Here the law
may bend: to ln of the target are added the squares and products of the ln of its variables, fitted
together with a step of the law's parameters, so that a departure of second order is followed and
only the rest of it is bias. The price is width: some 30 to 40 per cent where the law was right.
Beyond the data a parabola knows nothing, and forecasts take their doubt from the past instead.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Fit
from analysis.inference.cluster_robust import Sandwich, covariance, projection, slopes_at
from analysis.laws.bound import log_loss
from analysis.laws.law import Law
from analysis.tables.frames import Array

LEAST_FREEDOM = 6
"""Rows that have to be left over when the law and its bend are fitted."""
ROUNDS = 500
TOLERANCE = 1e-12


@dataclass(frozen=True)
class ShapeRobust:
    """A fit with its bend.

    Attributes:
        found: step of the law's parameters and coefficients of the bend, with their covariance.
    """

    fit: Fit
    found: Sandwich

    def predict(self, rows: pd.DataFrame) -> tuple[Array, Array, Array]:
        """Ln of the expected target at rows inside the data, its standard error, and its dof."""
        slopes = _slopes(self.fit, rows)
        error, freedom = self.found.error_and_freedom(slopes)
        law = log_loss(self.fit.form.design(rows), self.fit.theta[None])[0]
        return law + slopes @ self.found.theta, error, freedom

    def inside(self, rows: pd.DataFrame) -> Array:
        """Which rows lie in the range of every variable of the fit, and of products and ratios.

        In ln N and ln D that cuts the corners off, where a parabola would run on alone.
        """
        known, asked = (_with_pairs(_logs(self.fit, each)) for each in (self.fit.rows, rows))
        slack = 1e-9
        return ((asked >= known.min(axis=0) - slack) & (asked <= known.max(axis=0) + slack)).all(1)


def bend(fit: Fit) -> ShapeRobust | None:
    """Let a fitted law bend; None where there are too few rows to, or no variables."""
    if not isinstance(fit.law, Law) or not fit.law.factors:
        return None
    slopes = _slopes(fit, fit.rows)
    if fit.weights.sum() - slopes.shape[1] < LEAST_FREEDOM:
        return None
    step = _regress(fit, slopes)
    return ShapeRobust(fit, covariance(fit, step, slopes, fit.residuals - slopes @ step))


def _regress(fit: Fit, slopes: Array) -> Array:
    """Huber regression of the residuals, by steps that solve for the clipped ones."""
    scale = np.sqrt(fit.weights)
    solve = projection(slopes * scale[:, None])[1]
    step = np.zeros(slopes.shape[1])
    for _ in range(ROUNDS):
        left = np.clip(fit.residuals - slopes @ step, -fit.delta, fit.delta)
        change = solve @ (left * scale)
        step = step + change
        if np.abs(slopes @ change).max() < TOLERANCE:
            break
    return step


def _slopes(fit: Fit, rows: pd.DataFrame) -> Array:
    known, asked = (_logs(fit, each) for each in (fit.rows, rows))
    spread = np.maximum(known.std(axis=0), 1e-12)
    place = (asked - known.mean(axis=0)) / spread
    first, second = np.triu_indices(place.shape[1])
    return np.concatenate([slopes_at(fit, rows), place[:, first] * place[:, second]], axis=1)


def _logs(fit: Fit, rows: pd.DataFrame) -> Array:
    """Ln of each variable of the law (rows, variables)."""
    assert isinstance(fit.law, Law)
    variables = {factor.variable: factor for factor in fit.law.factors}
    return np.stack([factor.logs(rows) for factor in variables.values()], axis=1)


def _with_pairs(logs: Array) -> Array:
    """Columns, and the sum and the difference of each two."""
    first, second = np.triu_indices(logs.shape[1], 1)
    pairs = logs[:, first] + logs[:, second], logs[:, first] - logs[:, second]
    return np.concatenate([logs, *pairs], axis=1)
