"""An architecture effect corrected for how well each arm is tuned.

Each arm's ln L is lowered by its gaps: those of the rate and of the batch add up, those between
probed rungs are interpolated in ln N and held beyond them, and all corpora, horizons and seeds take
the same. A gap that noise may have made moves nothing but adds its error. Ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.effects.contrasts import Contrast, summarise
from analysis.effects.tuning import EDGE, Gap
from analysis.inference.intervals import Interval, SharedError
from analysis.tables.frames import Array, floats, means
from analysis.validity.refusal import Refusal


@dataclass(frozen=True)
class Correction:
    """What one arm's gaps take off its ln L.

    Attributes:
        rungs: probed sizes, ascending [parameters].
        gaps: at each of them, of both directions together.
        errors: of these.
        open: gaps that are known from below alone.
        probes: runs behind them.
    """

    rungs: Array
    gaps: Array
    errors: Array
    open: tuple[Gap, ...]
    probes: int

    def at(self, parameters: Array) -> Array:
        """The gap at other sizes: interpolated in ln N, held beyond the probed ones."""
        return np.interp(np.log(parameters), np.log(self.rungs), self.gaps)

    def error(self, parameters: Array) -> float:
        """Standard error of the mean of the gap over sizes."""
        weights = [
            np.interp(np.log(parameters), np.log(self.rungs), unit).mean()
            for unit in np.eye(len(self.rungs))
        ]
        return float(np.hypot.reduce(np.array(weights) * self.errors))


NO_CORRECTION = Correction(np.ones(1), np.zeros(1), np.zeros(1), (), 0)


def correction_of(gaps: Sequence[Gap]) -> Correction:
    """The correction of one arm."""
    if not gaps:
        return NO_CORRECTION
    at = np.array([each.parameters for each in gaps])
    clear = np.array([each.gap.estimate if each.clear else 0.0 for each in gaps])
    errors = np.array([each.error for each in gaps])
    rungs = np.unique(at)
    return Correction(
        rungs,
        np.array([clear[at == rung].sum() for rung in rungs]),
        # The errors of the two directions share that of the run in use, so they add up.
        np.array([errors[at == rung].sum() for rung in rungs]),
        tuple(each for each in gaps if each.verdict == EDGE),
        sum(each.probes for each in gaps),
    )


def tuned_contrast(contrast: Contrast, gaps: Sequence[Gap], freedom: int) -> Contrast | Refusal:
    """The contrast of two architectures as it would be with both at their best rate and batch.

    Where an arm is not bracketed the effect has no end to that side, and is refused if it may have
    another sign. Without probes of either arm the contrast stays as it is.

    Args:
        contrast: as measured.
        gaps: of all arms.
        freedom: degrees of freedom of the noise in them.
    """
    baseline, other = (
        correction_of([each for each in gaps if each.architecture == name])
        for name in (contrast.baseline, contrast.other)
    )
    if not baseline.probes and not other.probes:
        return contrast
    sizes = floats(means(contrast.pairs, ["rung"], ["parameters"]), "parameters")
    error = math.hypot(baseline.error(sizes), other.error(sizes))
    pairs = _corrected(contrast.pairs, baseline, other)
    loss = float(np.mean([floats(pairs, f"loss_nats_{side}") for side in ("baseline", "other")]))
    count = baseline.probes + other.probes
    found = summarise(
        contrast.factor,
        (contrast.baseline, contrast.other),
        contrast.evaluation_set,
        pairs,
        contrast.influence,
        (
            SharedError(error, freedom, "tuning probes", count),
            SharedError(error * loss, freedom, "tuning probes", count),
        ),
    )
    if isinstance(found, Refusal):
        return found
    if not baseline.open and not other.open:
        return found
    return _open_ended(found, baseline.open, other.open)


def _corrected(pairs: pd.DataFrame, baseline: Correction, other: Correction) -> pd.DataFrame:
    sizes = floats(pairs, "parameters")
    before = floats(pairs, "loss_nats_baseline") * np.exp(-baseline.at(sizes))
    after = floats(pairs, "loss_nats_other") * np.exp(-other.at(sizes))
    return pairs.assign(
        loss_nats_baseline=before,
        loss_nats_other=after,
        difference=np.log(after / before),
        nats=after - before,
    )


def _open_ended(
    contrast: Contrast, baseline: Sequence[Gap], other: Sequence[Gap]
) -> Contrast | Refusal:
    """A better baseline raises the effect, a better other arm lowers it, by an unknown amount."""

    def opened(interval: Interval) -> Interval:
        low = -math.inf if other else interval.low
        high = math.inf if baseline else interval.high
        return replace(interval, low=low, high=high)

    effect = opened(contrast.effect)
    if effect.excludes(0.0):
        return replace(contrast, effect=effect, nats=opened(contrast.nats))
    return not_bracketed((*baseline, *other), "the sign of the architecture effect")


def not_bracketed(gaps: Sequence[Gap], of: str) -> Refusal:
    """R-TUNING: an answer rests on arms whose tuning is not bracketed."""
    places = [
        f"{each.architecture} at {each.rung} is better at {each.best_factor:g} times its "
        f"{each.direction}, by {100 * math.expm1(each.gap.estimate):.2g} % of loss, and may be "
        f"better still beyond"
        for each in gaps
    ]
    return Refusal("R-TUNING", f"{of} rests on tuning: {'; '.join(places)}", runs_to_settle(gaps))


def runs_to_settle(gaps: Sequence[Gap]) -> str:
    """The runs that would bracket each choice, as a remedy."""
    runs = [
        f"{each.architecture} {each.rung} at {factor:g} x its {each.direction}"
        for each in gaps
        for factor in each.missing
    ]
    return f"train {', '.join(runs)} (a further factor in the ladder's tuning_probes)"
