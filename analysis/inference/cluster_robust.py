"""Cluster-robust intervals of one fit, inside its data.

Errors of points from one trunk are correlated and need not have one variance, so the covariance is
the cluster-robust one with the bias-reduced residuals of Bell and McCaffrey 2002 (CR2), and the
quantile is Student's with the degrees of freedom of Imbens and Kolesar 2016, which shrink with the
number of clusters that a quantity really rests on. Residuals of a Huber fit enter as pseudo-values
(Huber 1973): clipped, and divided by the share that was not.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.estimator import Fit
from analysis.inference.intervals import LEVEL, Interval
from analysis.laws.bound import log_loss, log_loss_and_jacobian
from analysis.tables.frames import Array, strings

LEAST_REST = 1e-4
CLUSTER = "trunk_id"


@dataclass(frozen=True)
class Sandwich:
    """The covariance of a fit's parameters, as its clusters' contributions to it.

    Attributes:
        influence: (clusters, parameters, rows): how each row's error moves the parameters through
            each cluster's adjusted residuals, for the degrees of freedom.
        pushes: (clusters, parameters): each cluster's share of the error of the parameters.
        shared: estimated variance that the rows of a cluster share.
        own: estimated variance of each row by itself.
        members: (clusters, rows), one where a row belongs to a cluster.
    """

    theta: Array
    pushes: Array
    influence: Array
    members: Array
    shared: float
    own: float

    def error_and_freedom(self, directions: Array) -> tuple[Array, Array]:
        """Standard errors of linear functions of theta (functions, parameters), and their dof."""
        variance = ((directions @ self.pushes.T) ** 2).sum(axis=1)
        freedom = np.empty(len(directions))
        for place, direction in enumerate(directions):
            weights = np.einsum("p,gpn->gn", direction, self.influence)
            together = weights @ self.members.T
            # Imbens and Kolesar 2016: the dof are those of a chi-square with the mean and variance
            # of the estimated variance, under a random effect of clusters.
            square = self.own * weights @ weights.T + self.shared * together @ together.T
            total = (square**2).sum()
            freedom[place] = np.trace(square) ** 2 / total if total > 0 else 1.0
        return np.sqrt(variance), np.maximum(freedom, 1.0)

    def interval(self, estimate: float, direction: Array, level: float = LEVEL) -> Interval:
        """Interval of a function of theta with this gradient."""
        error, freedom = self.error_and_freedom(direction[None])
        half = float(error[0] * stats.t.ppf(0.5 + 0.5 * level, freedom[0]))
        method = f"cluster-robust (CR2), t with {freedom[0]:.1f} degrees of freedom"
        return Interval(estimate, estimate - half, estimate + half, method)


@dataclass(frozen=True)
class LogPrediction:
    """Ln of the expected target at several rows.

    Attributes:
        log: the prediction.
        error: its standard error.
        freedom: degrees of freedom of that error.
    """

    log: Array
    error: Array
    freedom: Array


def sandwich(fit: Fit) -> Sandwich:
    """The cluster-robust covariance of a fit; each row is its own cluster without `trunk_id`."""
    return covariance(fit, fit.theta, slopes_at(fit, fit.rows), fit.residuals)


def slopes_at(fit: Fit, rows: pd.DataFrame) -> Array:
    """Derivatives of ln of the fitted target at rows by the parameters (rows, parameters)."""
    return log_loss_and_jacobian(fit.form.design(rows), fit.theta[None])[1][0]


def covariance(fit: Fit, theta: Array, slopes: Array, residuals: Array) -> Sandwich:
    """The covariance of any regression on the fit's rows, weighted and clipped as the fit is.

    Args:
        fit: whose weights, threshold of clipping and clusters are taken.
        theta: its coefficients.
        slopes: (rows, coefficients).
        residuals: (rows).
    """
    scale = np.sqrt(fit.weights)
    basis, solve = projection(slopes * scale[:, None])
    rest = np.eye(len(basis)) - basis @ basis.T
    errors = _pseudo_values(fit, residuals, slopes.shape[1]) * scale
    clusters = cluster_index(fit.rows)
    members = np.equal(np.arange(clusters.max() + 1)[:, None], clusters).astype(float)
    pushes, influence = [], []
    for cluster in range(len(members)):
        mine = clusters == cluster
        # CR2: residuals of a cluster times (I - H_gg)^-1/2, unbiased for independent errors.
        adjusted = solve[:, mine] @ _root_inverse(rest[np.ix_(mine, mine)])
        pushes.append(adjusted @ errors[mine])
        influence.append(adjusted @ rest[mine])
    shared, own = _variances(errors, members, basis.shape[1])
    return Sandwich(theta, np.stack(pushes), np.stack(influence), members, shared, own)


def projection(slopes: Array) -> tuple[Array, Array]:
    """An orthonormal basis of the columns, and the matrix that solves least squares."""
    basis, singular, right = np.linalg.svd(slopes, full_matrices=False)
    # Directions that the rows do not determine are left out, not inverted.
    keep = singular > 1e-10 * singular[0]
    basis = basis[:, keep]
    return basis, (right[keep].T / singular[keep]) @ basis.T


def parameter_interval(fit: Fit, vcov: Sandwich, label: str) -> Interval:
    """Interval of one parameter by label, in the coordinates of the fit (exponents, ln E)."""
    slot = fit.form.labels.index(label)
    return vcov.interval(float(fit.theta[slot]), np.eye(len(fit.theta))[slot])


def prediction_errors(fit: Fit, vcov: Sandwich, rows: pd.DataFrame) -> LogPrediction:
    """Ln of the fitted target at rows, with its standard error."""
    error, freedom = vcov.error_and_freedom(slopes_at(fit, rows))
    return LogPrediction(log_loss(fit.form.design(rows), fit.theta[None])[0], error, freedom)


def cluster_index(rows: pd.DataFrame) -> Array:
    """The number of each row's cluster."""
    if CLUSTER not in rows:
        return np.arange(len(rows))
    return np.unique(strings(rows, CLUSTER), return_inverse=True)[1]


def _pseudo_values(fit: Fit, residuals: Array, parameters: int) -> Array:
    inside = np.abs(residuals) <= fit.delta
    # Huber 1973: clipped residuals over the share that is not clipped, with his correction for
    # the number of parameters.
    share = max(float(np.average(inside, weights=fit.weights)), 0.1)
    correction = 1.0 + parameters / float(fit.weights.sum()) * (1.0 - share) / share
    return correction * np.clip(residuals, -fit.delta, fit.delta) / share


def _root_inverse(matrix: Array) -> Array:
    """Inverse square root, zero in directions that only this cluster determines."""
    values, vectors = np.linalg.eigh(matrix)
    gains = np.where(values > LEAST_REST, np.maximum(values, LEAST_REST) ** -0.5, 0.0)
    return (vectors * gains) @ vectors.T


def _variances(errors: Array, members: Array, parameters: int) -> tuple[float, float]:
    """Variance shared inside clusters and variance of one row, by moments."""
    total = float(errors @ errors) / max(len(errors) - parameters, 1)
    sums, squares = members @ errors, members @ errors**2
    sizes = members.sum(axis=1)
    pairs = float((sizes * (sizes - 1)).sum())
    shared = max(float((sums**2 - squares).sum()) / pairs, 0.0) if pairs else 0.0
    # Moments may make the row's own variance negative; dof need it positive.
    return shared, max(total - shared, 1e-3 * total)
