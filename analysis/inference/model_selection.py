"""Which parameters differ between arms: nested laws compared, and one effect with its interval.

The criteria answer different questions: AICc and BIC describe these points, the hold-out error over
trunks measures prediction of unseen trunks. Where they disagree, choose by hold-out error for
forecasts and by BIC for description; both are shown.

Sources: Hurvich and Tsai 1989 (AICc), Schwarz 1978 (BIC), Breiman et al. 1984, "Classification and
Regression Trees" (the simplest model within one standard error of the best), Pustejovsky and Tipton
2018 (the omnibus test).
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.estimator import Estimator, Fit
from analysis.fitting.solver import solve
from analysis.inference.cluster_robust import Sandwich, cluster_index, sandwich
from analysis.inference.intervals import Interval
from analysis.laws.bound import log_loss, log_loss_and_jacobian
from analysis.laws.law import Law, group_of
from analysis.tables.frames import Array, floats, keep
from analysis.validity.refusal import Refusal

FOLDS = 5
TOLERANCE = 1e-9
BIC_TIE = 2.0
"""Laws whose BIC differs by less count as equally good; by convention."""


@dataclass(frozen=True)
class Choice:
    """A nested family on one table.

    Attributes:
        table: one row per law: `parameters`, `AICc`, `BIC`, `hold_out` (root mean square error of
            ln L on trunks left out) and `hold_out_se`, or the refusal as `status`.
        fits: the laws that could be fitted, by least squares.
        forecast: the simplest law whose hold-out error is within one standard error of the best.
        description: the simplest law whose BIC is within 2 of the lowest.
    """

    table: pd.DataFrame
    fits: dict[str, Fit]
    forecast: str | None
    description: str | None


def choose(rows: pd.DataFrame, laws: dict[str, Law], estimator: Estimator | None = None) -> Choice:
    """Fit every law of a family by least squares, score each, and name the ones to use.

    Criteria need a likelihood, which Huber's loss is not: the fits here are least squares.
    """
    estimator = replace(estimator or Estimator(), delta=np.inf)
    results = {name: estimator.fit(rows, law) for name, law in laws.items()}
    fits = {name: fit for name, fit in results.items() if isinstance(fit, Fit)}
    folds = _folds(rows)
    records = [_score(name, fit, folds) for name, fit in results.items()]
    scored = [record for record in records if record["law"] in fits]
    table = pd.DataFrame(records)
    if not scored:
        return Choice(table, fits, None, None)
    best = min(scored, key=lambda record: record["hold_out"])
    # One standard error: a smaller law that predicts as well within noise is preferred.
    limit = best["hold_out"] + best["hold_out_se"]
    near = [record for record in scored if record["hold_out"] <= limit]
    forecast = min(near, key=lambda record: record["parameters"])
    lowest = min(record["BIC"] for record in scored) + BIC_TIE
    described = [record for record in scored if record["BIC"] <= lowest]
    description = min(described, key=lambda record: record["parameters"])
    return Choice(table, fits, forecast["law"], description["law"])


@dataclass(frozen=True)
class OmnibusTest:
    """One test of all arm effects together.

    Attributes:
        statistic: F, with `freedom` of the effects and of their covariance.
        p: chance of one as large or larger if no arm differs.
    """

    statistic: float
    freedom: tuple[float, float]
    p: float


def effect(fit: Fit, baseline: str, other: str, vcov: Sandwich | None = None) -> Interval | Refusal:
    """Mean difference of fitted ln L between two groups, over the places where both were run.

    One number with one degree of freedom, so that "these arms differ" is a single test and not a
    search over parameters. Both laws are evaluated at the rows of both groups.
    """
    if (refused := _single_trunks(fit, (baseline, other))) is not None:
        return refused
    estimate, direction = _difference(fit, baseline, other)
    return (vcov or sandwich(fit)).interval(estimate, direction)


def omnibus_test(fit: Fit, vcov: Sandwich | None = None) -> OmnibusTest | Refusal:
    """Test that no group differs from the first, with the covariance between their effects.

    Hotelling's T^2 as Pustejovsky and Tipton 2018 use it for cluster-robust covariances; their
    degrees of freedom are replaced by the fewest of any single effect, which is conservative.
    """
    if (refused := _single_trunks(fit, fit.form.groups)) is not None:
        return refused
    vcov = vcov or sandwich(fit)
    first, *others = fit.form.groups
    pairs = [_difference(fit, first, other) for other in others]
    estimates, directions = np.array([e for e, _ in pairs]), np.stack([d for _, d in pairs])
    fewest = float(vcov.error_and_freedom(directions)[1].min())
    count, rest = len(others), fewest - len(others) + 1
    spread = (directions @ vcov.pushes.T) @ (directions @ vcov.pushes.T).T
    if rest <= 0 or np.linalg.matrix_rank(spread) < count:
        return Refusal(
            "R-PAIRS",
            f"{count + 1} arms on {fewest:.1f} degrees of freedom",
            "add sizes or trunks, or compare fewer arms",
        )
    square = float(estimates @ np.linalg.solve(spread, estimates))
    # Hotelling: T^2 (freedom - count + 1) / (freedom count) follows F.
    statistic = rest / (fewest * count) * square
    return OmnibusTest(statistic, (float(count), rest), float(stats.f.sf(statistic, count, rest)))


def _single_trunks(fit: Fit, names: tuple[str, ...]) -> Refusal | None:
    """An arm with a single trunk: the trunk's random error cannot be separated from the effect."""
    groups, clusters = np.array(group_of(fit.rows, fit.law.by)), cluster_index(fit.rows)
    single = [name for name in names if len(np.unique(clusters[groups == name])) < 2]
    if not single:
        return None
    return Refusal(
        "R-PAIRS",
        f"all rows of {', '.join(single)} are of one trunk, so its seed noise looks like an effect",
        "train a second trunk, of another size or seed",
    )


def _difference(fit: Fit, baseline: str, other: str) -> tuple[float, Array]:
    """The effect, and its gradient by the parameters."""
    groups = np.array(group_of(fit.rows, fit.law.by))
    rows = keep(fit.rows, np.isin(groups, [baseline, other]))
    design = [fit.form.design(_as_group(fit, rows, group)) for group in (baseline, other)]
    (first, first_slopes), (second, second_slopes) = (
        log_loss_and_jacobian(each, fit.theta[None]) for each in design
    )
    direction = (second_slopes[0] - first_slopes[0]).mean(axis=0)
    return float((second[0] - first[0]).mean()), direction


def _as_group(fit: Fit, rows: pd.DataFrame, group: str) -> pd.DataFrame:
    labels = np.array(group_of(fit.rows, fit.law.by))
    example = fit.rows.iloc[int(np.flatnonzero(labels == group)[0])]
    return rows.assign(**{column: example[column] for column in fit.law.by})


def _folds(rows: pd.DataFrame) -> Array:
    """The fold of each row. Trunks stay whole; sorted by size they go to the folds in turn."""
    clusters = cluster_index(rows)
    size = floats(rows, "parameters")
    means = [size[clusters == cluster].mean() for cluster in range(clusters.max() + 1)]
    order = np.argsort(means, kind="stable")
    fold_of = np.empty(len(order), dtype=int)
    fold_of[order] = np.arange(len(order)) % min(FOLDS, len(order))
    return fold_of[clusters]


def _score(name: str, fit: Fit | Refusal, folds: Array) -> dict:
    if isinstance(fit, Refusal):
        missing = dict.fromkeys(("parameters", "AICc", "BIC", "hold_out", "hold_out_se"), np.nan)
        return {"law": name, **missing, "status": str(fit)}
    aicc, bic = criteria(fit)
    errors = hold_out_errors(fit, folds)
    by_fold = np.array([np.mean(errors[folds == fold] ** 2) for fold in np.unique(folds)])
    mean = float(np.sqrt(by_fold.mean()))
    # Delta method from the mean square to its root.
    se = float(by_fold.std(ddof=1) / np.sqrt(len(by_fold)) / (2 * mean)) if mean > 0 else 0.0
    return {
        "law": name,
        "parameters": float(len(fit.theta)),
        "AICc": aicc,
        "BIC": bic,
        "hold_out": mean,
        "hold_out_se": se,
        "status": fit.status,
    }


def hold_out_errors(fit: Fit, folds: Array) -> Array:
    """Residual of each row under the law fitted without its fold, all folds solved at once."""
    names = np.unique(folds)
    problem = fit.problem
    # A fold is left out by a weight of zero, so that all folds are replicates of one problem.
    weights = problem.weights * (folds[None] != names[:, None])
    held = replace(problem, weights=weights)
    theta, _ = solve(held, np.tile(fit.theta, (len(names), 1)), TOLERANCE)
    predicted = log_loss(problem.design, theta)
    place = np.searchsorted(names, folds)
    return problem.y - predicted[place, np.arange(len(folds))]


def criteria(fit: Fit) -> tuple[float, float]:
    """AICc and BIC of a least-squares fit: normal errors with their variance estimated."""
    # One more than the coefficients: the error variance is estimated too.
    count, k = len(fit.rows), len(fit.theta) + 1
    # The objective is half the sum of squares. -2 ln likelihood is n ln(RSS / n), up to a constant
    # that is equal for all laws.
    deviance = count * np.log(max(2 * fit.objective / count, 1e-300))
    correction = 2 * k * (k + 1) / (count - k - 1) if count > k + 1 else np.inf
    return float(deviance + 2 * k + correction), float(deviance + k * np.log(count))
