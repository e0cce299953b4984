"""`ScalingLaw`: fit and predict in the manner of scikit-learn.

The constructor stores its arguments, `fit` estimates, `predict` answers. What was estimated is one
frozen record, so a fitted law can be passed around without being changed.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.backtest import BackTest, Forecast, backtest, forecast
from analysis.inference.cluster_robust import (
    Sandwich,
    parameter_interval,
    prediction_errors,
    sandwich,
)
from analysis.inference.intervals import LEVEL, Interval
from analysis.inference.profile_likelihood import Profile, profile
from analysis.inference.shape_robust import ShapeRobust, shape_robust
from analysis.laws.bound import AnyLaw
from analysis.laws.catalog import BATCH, CHINCHILLA, GADRE, GAMMA, KAPLAN, POWER, RATE
from analysis.laws.law import Law
from analysis.laws.multi_power import MULTI_POWER
from analysis.laws.task_error import TaskError
from analysis.laws.transformed import REPEAT
from analysis.tables.compute import training_flops
from analysis.tables.frames import floats
from analysis.validity.extrapolation import Target, extrapolation
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

LAWS: dict[str, AnyLaw] = {
    law.name: law
    for law in (
        CHINCHILLA, GAMMA, KAPLAN, GADRE, POWER, REPEAT, RATE, BATCH, MULTI_POWER, TaskError(),
    )
}  # fmt: skip
"""Every law that can be chosen by name; loss to loss is made for two columns instead."""


@dataclass(frozen=True)
class Learnt:
    """What a fit found.

    Attributes:
        parameters: an interval per exponent, and per term at the centre of the data.
        shape_robust: intervals inside the data that do not rest on the law's shape; None where rows
            are too few.
        backtest: rolling forecasts, for tables that have sizes and tokens.
    """

    fit: Fit
    covariance: Sandwich
    shape_robust: ShapeRobust | None
    parameters: dict[str, Interval]
    backtest: BackTest | None


class ScalingLaw:
    """One law, to be fitted to a table.

    Args:
        law: a key of LAWS, or a law.
        by: columns whose combinations are fitted together.
        varies: parameters that differ between those combinations; all if not given.
        delta: where the Huber loss turns linear; found from the residuals if not given.
    """

    def __init__(
        self,
        law: str | AnyLaw = "chinchilla",
        by: tuple[str, ...] = (),
        varies: frozenset[str] | None = None,
        delta: float | None = None,
    ) -> None:
        self.law, self.by, self.varies, self.delta = law, by, varies, delta
        self._learnt: Learnt | Refusal | None = None

    def fit(self, table: pd.DataFrame) -> "ScalingLaw":
        """Fit to the rows of a table; `learnt_` is a refusal if they cannot determine the law.

        Raises:
            ValueError: no law has this name, or a parameter of `varies` is not one of the law.
        """
        law, estimator = self._resolved(), Estimator(delta=self.delta)
        result = estimator.fit(table.reset_index(drop=True), law)
        self._learnt = result if isinstance(result, Refusal) else _learn(estimator, result)
        return self

    @property
    def learnt_(self) -> Learnt | Refusal:
        """What was learnt.

        Raises:
            RuntimeError: nothing was fitted yet.
        """
        if self._learnt is None:
            raise RuntimeError("this law is not fitted yet; call fit with a table first")
        return self._learnt

    def predict(
        self, table: pd.DataFrame, interval: float = LEVEL, *, allow: bool = False
    ) -> pd.DataFrame | Refusal:
        """The target at each row with an interval for a new run: `estimate`, `low`, `high`.

        Inside the data `mean_low` and `mean_high` are a shape-robust interval of the mean of many
        runs. Beyond the largest compute the interval includes the back-test's error and the spread
        between laws; more than ten times beyond is refused unless `allow` is set.
        """
        learnt = self.learnt_
        if isinstance(learnt, Refusal):
            return learnt
        refusal = None if allow else _too_far(learnt.fit, table)
        if refusal is not None:
            return refusal
        predicted = _forecast(learnt, Estimator(delta=self.delta), table)
        return _at_level(predicted, learnt, table, interval)

    def profile(self, label: str) -> Profile | Refusal:
        """Profile likelihood of one parameter; an open interval stays open."""
        learnt = self.learnt_
        return learnt if isinstance(learnt, Refusal) else profile(learnt.fit, label)

    def _resolved(self) -> AnyLaw:
        if isinstance(self.law, str) and self.law not in LAWS:
            raise ValueError(f"unknown law {self.law!r}; known laws: {', '.join(sorted(LAWS))}")
        law = LAWS[self.law] if isinstance(self.law, str) else self.law
        if not self.by:
            return law
        varies = frozenset(law.parameters) if self.varies is None else self.varies
        unknown = sorted(varies - set(law.parameters))
        if unknown:
            raise ValueError(
                f"{unknown[0]} cannot vary, the {law.name} law has {', '.join(law.parameters)}"
            )
        return replace(law, by=self.by, varies=varies)


def _learn(estimator: Estimator, fit: Fit) -> Learnt:
    covariance = sandwich(fit)
    intervals = {}
    for label in fit.form.labels:
        interval = parameter_interval(fit, covariance, label)
        # Fitted as a logarithm, so the interval of the coefficient is asymmetric.
        if label.split(" [")[0] in fit.law.logs:
            interval = interval.mapped(lambda value: float(np.exp(value)))
        intervals[label] = interval
    tested = backtest(estimator, fit.rows, fit.law) if _has_compute(fit) else None
    return Learnt(fit, covariance, shape_robust(fit), intervals, tested)


def _has_compute(fit: Fit) -> bool:
    known = set(fit.rows.columns)
    return isinstance(fit.law, Law) and ("flops" in known or {"parameters", "tokens"} <= known)


def _too_far(fit: Fit, table: pd.DataFrame) -> Refusal | None:
    if not _has_compute(fit) or not {"parameters", "tokens"} <= set(table.columns):
        return None
    rows = fit.rows.assign(flops=training_flops(fit.rows))
    for n, d, c in zip(
        floats(table, "parameters"), floats(table, "tokens"), training_flops(table), strict=True
    ):
        finding: Caveat | Refusal | None = extrapolation(rows, Target(n, d, c), allow=False)
        if isinstance(finding, Refusal):
            return finding
    return None


def _forecast(learnt: Learnt, estimator: Estimator, table: pd.DataFrame) -> Forecast | None:
    if learnt.backtest is None:
        return None
    return forecast(learnt.fit, estimator, table, learnt.backtest)


def _at_level(
    predicted: Forecast | None, learnt: Learnt, table: pd.DataFrame, level: float
) -> pd.DataFrame:
    """Intervals at any level: each component times the quantile for its degrees of freedom."""
    mean = prediction_errors(learnt.fit, learnt.covariance, table)
    quantile = stats.t.ppf(0.5 + 0.5 * level, mean.freedom)
    normal = float(stats.norm.ppf(0.5 + 0.5 * level))
    # Without a back-test only the residual scatter stands beside the error of the mean.
    rest = np.full(len(table), float(np.std(learnt.fit.residuals)) ** 2)
    if predicted is not None:
        parts = predicted.rows[["sigma", "s_backtest", "s_laws"]].to_numpy(dtype=np.float64)
        rest = (parts**2).sum(axis=1)
    half = np.sqrt((quantile * mean.error) ** 2 + normal**2 * rest)
    low, high = _mean_interval(learnt.shape_robust, table, level).T
    ends = {"estimate": mean.log, "low": mean.log - half, "high": mean.log + half}
    columns = {name: np.exp(value) for name, value in ends.items()}
    answer = pd.DataFrame({**columns, "mean_low": low, "mean_high": high}, index=table.index)
    return answer if predicted is None else answer.join(predicted.rows.drop(columns=list(columns)))


def _mean_interval(robust: ShapeRobust | None, table: pd.DataFrame, level: float) -> np.ndarray:
    if robust is None:
        return np.full((len(table), 2), np.nan)
    mean = robust.predict(table)
    half = mean.error * stats.t.ppf(0.5 + 0.5 * level, mean.freedom)
    ends = np.exp(np.stack([mean.log - half, mean.log + half], axis=1))
    return np.where(robust.inside(table)[:, None], ends, np.nan)
