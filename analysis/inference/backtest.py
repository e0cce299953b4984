"""Extrapolation: what a forecast was worth in the past decides how wide the next one is.

The bootstrap of a law knows nothing of the law being wrong beyond its data, so an interval beyond
the largest compute adds the error that rolling forecasts of the same data had per decade, and the
spread between laws: half-width = 2 sqrt(s_fit^2 + sigma^2 + (k decades)^2 + (spread / 2)^2).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Estimator, Fit, observed
from analysis.inference.cluster_robust import prediction_errors, sandwich
from analysis.laws.bound import AnyLaw, log_loss
from analysis.laws.catalog import CHINCHILLA, GAMMA, KAPLAN
from analysis.tables.compute import training_flops
from analysis.tables.frames import Array, floats, keep
from analysis.validity.refusal import Refusal

CUTS = (30.0, 10.0, 3.0)
RIVALS = (CHINCHILLA, KAPLAN, GAMMA)
ASSUMED_RATE = 0.05
"""Error of ln L per decade where the data are too narrow to find their own."""
LEAST_DECADES = 1.5
LEAST_ABOVE = 3
LEAST_BELOW = 12


@dataclass(frozen=True)
class BackTest:
    """Rolling forecasts: fitted below a cut in compute, compared with the runs above it.

    Attributes:
        errors: one row per forecast run: `cut`, `law`, `decades` beyond the cut, and `error`, the
            observed minus the forecast ln of the target.
        rate: root mean square of |error| / decades, the growth of the error [1 / decade].
        assumed: whether the rate is assumed, as there was nothing to test on.
    """

    errors: pd.DataFrame
    rate: float
    assumed: bool

    @property
    def words(self) -> str:
        """The rate and where it is from."""
        if self.assumed:
            return f"{self.rate:.3f} per decade, assumed: the data allow no back-test"
        cuts = len(self.errors["cut"].unique())
        return f"{self.rate:.3f} per decade from {len(self.errors)} forecasts at {cuts} cuts"


@dataclass(frozen=True)
class Forecast:
    """Predictions with their intervals, and the parts that the widths are made of.

    Attributes:
        rows: `estimate`, `low`, `high` of the target; `s_fit`, `sigma`, `s_backtest` and `s_laws`
            of its ln; `decades` beyond the largest compute of the fit.
        laws: names of the laws whose spread is part of the width.
    """

    rows: pd.DataFrame
    backtest: BackTest
    laws: tuple[str, ...]


def backtest(estimator: Estimator, rows: pd.DataFrame, law: AnyLaw) -> BackTest:
    """Forecast the largest runs from the smaller ones, at several cuts in compute."""
    compute = np.log10(training_flops(rows))
    parts = []
    for cut in CUTS:
        limit = compute.max() - np.log10(cut)
        below, above = keep(rows, compute <= limit), keep(rows, compute > limit)
        if len(below) < LEAST_BELOW or len(above) < LEAST_ABOVE:
            continue
        found = estimator.fit(below.reset_index(drop=True), law)
        if isinstance(found, Refusal):
            continue
        decades = compute[compute > limit] - np.log10(training_flops(below)).max()
        error = observed(above, law) - log_loss(found.form.design(above), found.theta[None])[0]
        parts.append(
            pd.DataFrame({"cut": cut, "law": law.name, "decades": decades, "error": error})
        )
    if not parts or np.ptp(compute) < LEAST_DECADES:
        columns = pd.Index(["cut", "law", "decades", "error"])
        return BackTest(pd.DataFrame(columns=columns), ASSUMED_RATE, True)
    errors = pd.concat(parts, ignore_index=True)
    return BackTest(errors, _rate(errors), False)


def forecast(
    fit: Fit, estimator: Estimator, target: pd.DataFrame, tested: BackTest | None = None
) -> Forecast:
    """Predict rows inside or beyond the data; beyond, with the back-test's term and other laws.

    The interval is for a new run: it holds the residual noise.
    """
    tested = backtest(estimator, fit.rows, fit.law) if tested is None else tested
    mean = prediction_errors(fit, sandwich(fit), target)
    largest = np.log10(training_flops(fit.rows).max())
    decades = np.maximum(np.log10(training_flops(target)) - largest, 0.0)
    others = _rival_predictions(fit, estimator, target)
    spread = np.ptp(np.stack([mean.log, *others.values()]), axis=0)
    outside = decades > 0
    parts = {
        "s_fit": mean.error,
        "sigma": np.full(len(target), spread_of(fit)),
        "s_backtest": tested.rate * decades,
        "s_laws": np.where(outside, 0.5 * spread, 0.0),
    }
    half = 2.0 * np.sqrt(np.sum([part**2 for part in parts.values()], axis=0))
    found = pd.DataFrame(
        {
            "estimate": np.exp(mean.log),
            "low": np.exp(mean.log - half),
            "high": np.exp(mean.log + half),
            **parts,
            "decades": decades,
        },
        index=target.index,
    )
    return Forecast(found, tested, (fit.law.name, *others))


def spread_of(fit: Fit) -> float:
    """Standard deviation of the residuals, outliers included, for the degrees of freedom left."""
    freedom = max(float(fit.weights.sum()) - len(fit.theta), 1.0)
    return float(np.sqrt((fit.weights * fit.residuals**2).sum() / freedom))


def _rate(errors: pd.DataFrame) -> float:
    # A run just above a cut has hardly been forecast: its error is noise, not growth.
    far = keep(errors, floats(errors, "decades") > 0.1)
    if not len(far):
        return ASSUMED_RATE
    return float(np.sqrt(np.mean((floats(far, "error") / floats(far, "decades")) ** 2)))


def _rival_predictions(fit: Fit, estimator: Estimator, target: pd.DataFrame) -> dict[str, Array]:
    """Ln of the target by the other laws of the same variables, where they can be fitted."""
    if fit.law.name not in {law.name for law in RIVALS} or fit.law.by:
        return {}
    found = {}
    for law in RIVALS:
        other = None if law.name == fit.law.name else estimator.fit(fit.rows, law)
        if isinstance(other, Fit):
            found[law.name] = log_loss(other.form.design(target), other.theta[None])[0]
    return found
