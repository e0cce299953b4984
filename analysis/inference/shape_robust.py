"""Intervals inside the data that stay valid when the law's shape is slightly wrong.

A law of slightly wrong shape is biased between its points, by about half a standard error of the
Chinchilla law in synthetic studies, and its own standard error does not show that. Here quadratic
terms in the ln of the variables are added to ln of the target and fitted together with the
parameters: they absorb a departure of second order, and only the rest of it is bias. The cost is
width, 30 to 40 per cent where the law was right. Beyond the data a quadratic is no guide; forecasts
use the back-test instead.

Ours: one Gauss-Newton step of the law with the quadratic terms as extra regressors. How often its
intervals hold the truth is measured in tests/benchmarks/statistics/recovery.py.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Fit
from analysis.inference.cluster_robust import (
    LogPrediction,
    Sandwich,
    covariance,
    projection,
    slopes_at,
)
from analysis.laws.bound import log_loss
from analysis.laws.law import Law
from analysis.tables.frames import Array

LEAST_FREEDOM = 6
"""Rows that must be left over once the law and the quadratic terms are fitted."""
ROUNDS = 500
TOLERANCE = 1e-12


@dataclass(frozen=True)
class ShapeRobust:
    """A fit with quadratic terms added.

    Attributes:
        regression: a step of the law's parameters, and coefficients of the quadratic terms, with
            their covariance.
    """

    fit: Fit
    regression: Sandwich

    def predict(self, rows: pd.DataFrame) -> LogPrediction:
        """Ln of the expected target at rows inside the data, with its standard error."""
        slopes = _slopes(self.fit, rows)
        error, freedom = self.regression.error_and_freedom(slopes)
        law = log_loss(self.fit.form.design(rows), self.fit.theta[None])[0]
        return LogPrediction(law + slopes @ self.regression.theta, error, freedom)

    def inside(self, rows: pd.DataFrame) -> Array:
        """Which rows lie in the range of every variable of the fit, and of products and ratios.

        Products and ratios cut off the corners of the box in ln N and ln D, which hold no runs.
        """
        known, new = (_with_pairs(_logs(self.fit, each)) for each in (self.fit.rows, rows))
        slack = 1e-9
        return ((new >= known.min(axis=0) - slack) & (new <= known.max(axis=0) + slack)).all(1)


def shape_robust(fit: Fit) -> ShapeRobust | None:
    """Add the quadratic terms; None where rows are too few, or the law has no variables."""
    if not isinstance(fit.law, Law) or not fit.law.factors:
        return None
    slopes = _slopes(fit, fit.rows)
    if fit.weights.sum() - slopes.shape[1] < LEAST_FREEDOM:
        return None
    step = _regress(fit, slopes)
    return ShapeRobust(fit, covariance(fit, step, slopes, fit.residuals - slopes @ step))


def _regress(fit: Fit, slopes: Array) -> Array:
    """Huber regression of the residuals: repeated least squares on clipped residuals."""
    scale = np.sqrt(fit.weights)
    solve = projection(slopes * scale[:, None])[1]
    # Huber's modified residuals: only residuals change between rounds, so one factorisation serves
    # all; rounds are cheap and convergence is linear.
    step = np.zeros(slopes.shape[1])
    for _ in range(ROUNDS):
        left = np.clip(fit.residuals - slopes @ step, -fit.delta, fit.delta)
        change = solve @ (left * scale)
        step = step + change
        if np.abs(slopes @ change).max() < TOLERANCE:
            break
    return step


def _slopes(fit: Fit, rows: pd.DataFrame) -> Array:
    known, new = (_logs(fit, each) for each in (fit.rows, rows))
    spread = np.maximum(known.std(axis=0), 1e-12)
    # Standardised: squares of raw logs are nearly collinear with the logs themselves.
    place = (new - known.mean(axis=0)) / spread
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
