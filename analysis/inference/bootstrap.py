"""Intervals: bootstraps that resample trunks, t intervals over clusters, and ratios of means.

Points of one trunk share their training and its random error, so whole trunks are resampled. With
few trunks a case bootstrap draws degenerate designs (a size may be missing); then the residuals of
each trunk get a random sign and size instead (the wild cluster bootstrap of Cameron, Gelbach and
Miller 2008, with the weights of Webb 2014), and the spread is widened by Student's t for the number
of trunks. Ours: the choice between the two by trunks a cell, and the widening.
"""

from dataclasses import dataclass

import numpy as np

from analysis.fitting.estimator import Fit, observed
from analysis.fitting.solver import Problem, solve
from analysis.inference.intervals import LEVEL, Interval, t_over_normal
from analysis.laws.bound import log_loss, log_loss_and_jacobian
from analysis.laws.law import group_of
from analysis.tables.frames import Array, strings
from analysis.validity.refusal import Refusal

TRUNKS_FOR_CASES = 8
UNDEFINED_SHARE = 0.05
WARM_TOLERANCE = 1e-9
LEAST_REST = 1e-3
WEBB = np.sqrt([0.5, 1.0, 1.5])


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrap replicates of a fit, each warm-started at it.

    Attributes:
        theta: (replicates, parameters); not numbers where a replicate could not be fitted.
        stretch: factor that widens percentile intervals for the number of clusters.
        failed: replicates that could not be fitted.
    """

    theta: Array
    method: str
    clusters: int
    stretch: float
    failed: int = 0

    def interval(self, estimate: float, values: Array) -> Interval | Refusal:
        """Percentile interval of a statistic, given its value in each replicate.

        NaN counts as unbounded above. More than 5 % of values that are not finite is a refusal.
        """
        undefined = float((~np.isfinite(values)).mean())
        if undefined > UNDEFINED_SHARE:
            return Refusal(
                "R-MULT",
                f"undefined in {100 * undefined:.0f} % of the bootstrap replicates",
                "add sizes or horizons, or compare at a loss that both arms reach",
            )
        # Ranks, not interpolation: no number lies between a finite value and infinity.
        ranked = np.where(np.isnan(values), np.inf, values)
        tail = 0.5 * (1 - LEVEL)
        low, high = np.quantile(ranked, [tail, 1 - tail], method="inverted_cdf")
        # Each end moves away from the estimate, so the interval keeps its asymmetry; an estimate
        # that lies outside the percentiles is included.
        low, high = (float(estimate + self.stretch * (bound - estimate)) for bound in (low, high))
        return Interval(estimate, min(low, estimate), max(high, estimate), self.method)


def replicate(fit: Fit, count: int, generator: np.random.Generator) -> Bootstrap:
    """Refit `count` bootstrap samples, clustered by trunk."""
    trunks, index = np.unique(strings(fit.rows, "trunk_id"), return_inverse=True)
    cells = np.array(group_of(fit.rows, ("architecture", "corpus")))
    # Fewer trunks than this in any cell, and a draw may miss a whole size or corpus.
    smallest = min(len(np.unique(index[cells == cell])) for cell in np.unique(cells))
    if smallest >= TRUNKS_FOR_CASES:
        y = observed(fit.rows, fit.law)
        weights = fit.weights * _case_counts(index, cells, count, generator)
        method = f"case bootstrap over {len(trunks)} trunks, {count} replicates"
        return _replicates(fit, (y, weights, count), method, len(trunks))
    signs = _webb_signs(count, len(trunks), generator)[:, index]
    fitted = log_loss(fit.form.design(fit.rows), fit.theta[None])[0]
    y = fitted + signs * _jackknifed_residuals(fit, index)
    method = (
        f"wild cluster bootstrap over {len(trunks)} trunks with jackknifed residuals, {count} "
        "replicates, widened by t"
    )
    return _replicates(
        fit, (y, fit.weights, count), method, len(trunks), t_over_normal(len(trunks) - 1)
    )


def parameter_intervals(fit: Fit, replicates: Bootstrap) -> dict[str, Interval | Refusal]:
    """An interval for every parameter of a fit; coefficients are handled as logarithms."""
    intervals: dict[str, Interval | Refusal] = {}
    for group in fit.form.groups:
        point = fit.form.natural(fit.theta, group)
        for name, values in fit.form.natural(replicates.theta, group).items():
            interval = replicates.interval(float(point[name]), values)
            if (name, group) not in fit.form.slots:
                continue
            if name in fit.law.logs and isinstance(interval, Interval):
                # An open interval of a logarithm is an unbounded one of the coefficient.
                with np.errstate(over="ignore"):
                    interval = interval.mapped(lambda value: float(np.exp(value)))
            intervals[fit.form.labels[fit.form.slots[name, group]]] = interval
    return intervals


def _case_counts(index: Array, cells: Array, count: int, generator: np.random.Generator) -> Array:
    """Bootstrap counts per row: trunks drawn with replacement inside each cell."""
    counts = np.zeros((count, int(index.max()) + 1))
    for cell in np.unique(cells):
        trunks = np.unique(index[cells == cell])
        # Drawn inside each cell, so that every replicate keeps the design's arms and corpora.
        drawn = trunks[generator.integers(len(trunks), size=(count, len(trunks)))]
        np.add.at(counts, (np.arange(count)[:, None], drawn), 1.0)
    return counts[:, index]


def _jackknifed_residuals(fit: Fit, index: Array) -> Array:
    """Residuals as if each trunk had been left out of the fit: (I - H_gg)^-1 r_g by trunk.

    A flexible law follows each of a few trunks closely, so plain residuals are too small. Scaling
    by the degrees of freedom of points does not correct that, as points of a trunk err together.
    """
    jacobian = log_loss_and_jacobian(fit.form.design(fit.rows), fit.theta[None])[1][0]
    basis = np.linalg.svd(jacobian, full_matrices=False)[0]
    residuals = fit.residuals.copy()
    for trunk in np.unique(index):
        mine = index == trunk
        # I - H_gg, with the projection on the tangent space of the fit as the hat matrix H.
        rest = np.eye(int(mine.sum())) - basis[mine] @ basis[mine].T
        values, vectors = np.linalg.eigh(rest)
        # A direction that only this trunk determines has no residual to enlarge.
        gains = np.where(values > LEAST_REST, 1.0 / np.maximum(values, LEAST_REST), 1.0)
        residuals[mine] = vectors @ (gains * (vectors.T @ residuals[mine]))
    return residuals


def _webb_signs(count: int, trunks: int, generator: np.random.Generator) -> Array:
    """Six-point weights: plus and minus one alone give few distinct samples of few trunks."""
    size = WEBB[generator.integers(3, size=(count, trunks))]
    return size * (2.0 * generator.integers(2, size=(count, trunks)) - 1.0)


def _replicates(
    fit: Fit, data: tuple[Array, Array, int], method: str, clusters: int, stretch: float = 1.0
) -> Bootstrap:
    """Refit every sample, starting from the fit; failures are counted and named in the method."""
    y, weights, count = data
    problem = Problem(fit.form.design(fit.rows), y, weights, fit.delta)
    theta, reached = solve(problem, np.tile(fit.theta, (count, 1)), WARM_TOLERANCE)
    # A draw with no more distinct rows than parameters is solved exactly, and says nothing.
    different = np.count_nonzero(np.broadcast_to(weights, (count, len(fit.rows))), axis=1)
    bad = ~np.isfinite(reached) | (different <= len(fit.theta))
    theta[bad] = np.nan
    failed = int(bad.sum())
    if failed:
        method += f", {failed} of them could not be fitted"
    return Bootstrap(theta, method, clusters, stretch, failed)
