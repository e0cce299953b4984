"""Forecasts beyond the data, with intervals as wide as past forecasts were wrong.

The bootstrap of a law assumes that the law holds beyond its data. An interval beyond the largest
compute therefore adds the error per decade of rolling back-tests on the same data, and the spread
between laws: half-width = 2 sqrt(s_fit^2 + sigma^2 + (k decades)^2 + (spread / 2)^2). Ours: no
published interval is used; on public tables the bootstrap alone covers far fewer than 95 % of
held-out larger runs.
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
"""Error of ln L per decade of compute where the data are too narrow for a back-test."""
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
        assumed: whether the rate is the assumed one, as no back-test was possible.
    """

    errors: pd.DataFrame
    rate: float
    assumed: bool

    @property
    def words(self) -> str:
        """The rate and what it rests on."""
        if self.assumed:
            return f"{self.rate:.3f} per decade, assumed: compute spans too little for a back-test"
        cuts = len(self.errors["cut"].unique())
        return f"{self.rate:.3f} per decade from {len(self.errors)} forecasts at {cuts} cuts"


@dataclass(frozen=True)
class Forecast:
    """Predictions with their intervals, and the components of the widths.

    Attributes:
        rows: `estimate`, `low`, `high` of the target; `s_fit`, `sigma`, `s_backtest` and `s_laws`
            of its ln; `decades` beyond the largest compute of the fit.
        laws: names of the laws whose spread is part of the width.
    """

    rows: pd.DataFrame
    backtest: BackTest
    laws: tuple[str, ...]


def backtest(estimator: Estimator, rows: pd.DataFrame, law: AnyLaw) -> BackTest:
    """Forecast the largest runs from the smaller ones, at several cuts in compute.

    The cuts are fractions of the largest compute; each must leave enough rows on both sides.
    """
    compute = np.log10(training_flops(rows))
    parts = []
    for cut in CUTS:
        limit = compute.max() - np.log10(cut)
        below, above = keep(rows, compute <= limit), keep(rows, compute > limit)
        if len(below) < LEAST_BELOW or len(above) < LEAST_ABOVE:
            continue
        fitted = estimator.fit(below.reset_index(drop=True), law)
        if isinstance(fitted, Refusal):
            continue
        # Distance from the largest run that was fitted, not from the cut, which lies above it.
        decades = compute[compute > limit] - np.log10(training_flops(below)).max()
        error = observed(above, law) - log_loss(fitted.form.design(above), fitted.theta[None])[0]
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
    """Predict rows; beyond the largest compute with the back-test's error and the spread of laws.

    The interval is for a single new run, so it includes the residual noise.
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
    # 2, not 1.96: the components are standard deviations from few runs.
    half = 2.0 * np.sqrt(np.sum([part**2 for part in parts.values()], axis=0))
    predictions = pd.DataFrame(
        {
            "estimate": np.exp(mean.log),
            "low": np.exp(mean.log - half),
            "high": np.exp(mean.log + half),
            **parts,
            "decades": decades,
        },
        index=target.index,
    )
    return Forecast(predictions, tested, (fit.law.name, *others))


def spread_of(fit: Fit) -> float:
    """Standard deviation of the residuals, outliers included, for the degrees of freedom left."""
    # Not the robust sigma of the fit: a new run may be an outlier too.
    freedom = max(float(fit.weights.sum()) - len(fit.theta), 1.0)
    return float(np.sqrt((fit.weights * fit.residuals**2).sum() / freedom))


def _rate(errors: pd.DataFrame) -> float:
    # A run just above the cut is hardly extrapolated: its error is noise, and dividing by a
    # distance near zero would let it set the rate.
    far = keep(errors, floats(errors, "decades") > 0.1)
    if not len(far):
        return ASSUMED_RATE
    return float(np.sqrt(np.mean((floats(far, "error") / floats(far, "decades")) ** 2)))


def _rival_predictions(fit: Fit, estimator: Estimator, target: pd.DataFrame) -> dict[str, Array]:
    """Ln of the target by the other laws of the same variables, where they can be fitted."""
    if fit.law.name not in {law.name for law in RIVALS} or fit.law.by:
        return {}
    predictions = {}
    for law in RIVALS:
        other = None if law.name == fit.law.name else estimator.fit(fit.rows, law)
        if isinstance(other, Fit):
            predictions[law.name] = log_loss(other.form.design(target), other.theta[None])[0]
    return predictions
