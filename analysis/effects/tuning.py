"""What a study's learning rates and batches cost each architecture, from its tuning probes.

A gap is how far ln L lies above its lowest value along one direction, the learning rate or the
batch: a parabola in log2 of the factor on the run in use, through the best tried factor and its
neighbours. Ours: the correction for noise, the verdicts, and what counts as beyond noise.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.evaluation_error import covariance
from analysis.effects.seed_noise import ASSUMED_SEED_SD, SeedNoise, seed_noise
from analysis.inference.intervals import Interval, t_quantile
from analysis.tables.document_losses import DocumentLosses
from analysis.tables.frames import Array, floats, groups, keep, strings, where
from analysis.tables.run_table import Table
from analysis.validity.warnings import Caveat

DIRECTIONS = {"learning rate": "learning_rate_factor", "batch": "batch_factor"}
BRACKETED = "bracketed"
FLAT = "flat within noise"
INSIDE = "off, optimum inside"
EDGE = "not bracketed"
ONE_SIDED = "one side tried"
UNCHECKED = "not checked"
BEYOND = 0.5
"""How far outside the tried factors a parabola is followed, in doublings."""
PLACES = 101
NORMAL_FREEDOM = 1000
"""Degrees of freedom of an assumed noise, which are as good as none."""


@dataclass(frozen=True)
class Gap:
    """What one choice costs one architecture at one rung.

    Attributes:
        direction: a key of DIRECTIONS.
        verdict: BRACKETED, both neighbours are worse beyond noise; FLAT, none is better beyond
            noise; INSIDE, one is, and the lowest loss lies among the tried factors; EDGE, it may
            lie outside; ONE_SIDED, the study tries factors on one side alone, and none is better
            beyond noise; UNCHECKED, a probe has no loss.
        gap: ln L of the run in use above the lowest; without upper end where EDGE.
        error: standard error of its estimate, from the upper end, as gaps are skewed.
        best_factor: on the choice in use, where loss is lowest; of EDGE, the best that was tried.
        missing: factors on the choice whose loss would settle it; empty if it is settled.
        probes: those that have ended.
    """

    architecture: str
    rung: str
    parameters: float
    direction: str
    verdict: str
    gap: Interval
    error: float
    best_factor: float
    missing: tuple[float, ...]
    probes: int

    @property
    def clear(self) -> bool:
        """Whether the gap is larger than its interval's half width."""
        return self.gap.low > 0


@dataclass(frozen=True)
class ProbeNoise:
    """The noise of ln L of one run: its standard deviation, and where that comes from."""

    sd: float
    freedom: int
    source: str


@dataclass(frozen=True)
class _Tried:
    """Factors of one direction in log2, ascending, with the change of ln L from the run in use.

    The run in use is one of them, with a change of 0. A diverged probe has an infinite change.
    """

    x: Array
    change: Array
    covariance: Array
    quantile: float

    @property
    def errors(self) -> Array:
        return np.sqrt(np.diag(self.covariance))

    @property
    def best(self) -> int:
        return int(np.argmin(self.change))

    @property
    def clearly_better(self) -> bool:
        return bool((self.change < -self.quantile * self.errors).any())


def probe_noise(table: Table) -> ProbeNoise:
    """The study's own noise between seeds, or an assumed one."""
    rows = where(table.rows, "evaluation_set", table.neutral_set)
    noise = seed_noise(rows)
    if isinstance(noise, SeedNoise):
        return ProbeNoise(noise.sd.estimate, noise.freedom, "measured between this study's seeds")
    return ProbeNoise(ASSUMED_SEED_SD, NORMAL_FREEDOM, "assumed, as no cell has two seeds")


def tuning_gaps(table: Table) -> tuple[Gap, ...]:
    """The gap of each architecture, rung and direction that the study probes.

    Args:
        table: with nothing but decayed points of finished runs.
    """
    noise = probe_noise(table)
    found = []
    for direction, column in DIRECTIONS.items():
        others = [name for name in DIRECTIONS.values() if name != column]
        along = keep(
            table.probes,
            (table.probes[column] != 1) & (table.probes[others] == 1).all(axis=1),
        )
        for _, probes in groups(along, ["architecture", "rung", "corpus", "seed", "order_seed"]):
            found.append(_gap(table, probes, direction, noise))
    return tuple(found)


def unchecked(gaps: tuple[Gap, ...]) -> Caveat | None:
    """W-TUNING: nothing was probed, or a probe has no loss."""
    if not gaps:
        return Caveat("W-TUNING", "no tuning probes were trained")
    missing = [each for each in gaps if each.verdict == UNCHECKED]
    names = ", ".join(f"{each.architecture} at {each.rung} ({each.direction})" for each in missing)
    return Caveat("W-TUNING", f"a probe has no loss: {names}") if missing else None


def _gap(table: Table, probes: pd.DataFrame, direction: str, noise: ProbeNoise) -> Gap:
    factors, losses = floats(probes, DIRECTIONS[direction]), floats(probes, "loss_nats")
    diverged = strings(probes, "status") == "diverged"
    in_use = floats(probes, "loss_in_use")
    ended = (np.isfinite(losses) | diverged) & np.isfinite(in_use)
    logs = np.where(diverged, np.inf, np.log(losses / in_use))
    partners = strings(probes, "compared_with")
    documents = [
        _influence(table, probe, partner)
        for probe, partner in zip(strings(probes, "run_id"), partners, strict=True)
    ]
    tried = _tried(
        np.log2(factors[ended]),
        logs[ended],
        [each for each, done in zip(documents, ended, strict=True) if done],
        noise,
    )
    verdict, lost = _verdict(tried, bool(ended.all())), factors[~ended]
    estimate, error, best = _estimate(tried)
    low = max(0.0, estimate - tried.quantile * error)
    high = max(estimate + tried.quantile * error, _highest(tried))
    error = (high - estimate) / tried.quantile
    high = math.inf if verdict == EDGE else high
    outward = tuple(float(2.0**each) for each in _outward(tried)) if verdict == EDGE else ()
    method = f"parabola through {len(tried.x)} runs, seed sd {100 * noise.sd:.2g} %"
    return Gap(
        architecture=str(probes["architecture"].iloc[0]),
        rung=str(probes["rung"].iloc[0]),
        parameters=float(floats(probes, "parameters")[0]),
        direction=direction,
        verdict=verdict,
        gap=Interval(estimate, low, high, method),
        error=error,
        best_factor=float(2.0**best),
        missing=outward if verdict == EDGE else tuple(float(each) for each in lost),
        probes=int(ended.sum()),
    )


def _influence(table: Table, probe: str, in_use: str) -> Array | None:
    """What each document adds to ln of the ratio of the two losses."""
    sides = [table.documents.get(name, {}).get(table.neutral_set) for name in (probe, in_use)]
    other, own = sides
    if not isinstance(other, DocumentLosses) or not isinstance(own, DocumentLosses):
        return None
    if not np.array_equal(other.targets, own.targets) or len(own.targets) < 2:
        return None
    return other.nats / other.nats.sum() - own.nats / own.nats.sum()


def _tried(x: Array, change: Array, documents: list[Array | None], noise: ProbeNoise) -> _Tried:
    count = len(x)
    # Each change has the noise of its probe and that of the run in use, which all of them share.
    seeds = noise.sd**2 * (np.eye(count) + np.ones((count, count)))
    for i, left in enumerate(documents):
        for j, right in enumerate(documents):
            if left is not None and right is not None:
                seeds[i, j] += covariance(left, right)
    whole = np.zeros((count + 1, count + 1))
    whole[:count, :count] = seeds
    order = np.argsort(np.append(x, 0.0))
    return _Tried(
        np.append(x, 0.0)[order],
        np.append(change, 0.0)[order],
        whole[np.ix_(order, order)],
        t_quantile(noise.freedom),
    )


def _verdict(tried: _Tried, complete: bool) -> str:
    interior = 0 < tried.best < len(tried.x) - 1
    if tried.clearly_better:
        return INSIDE if interior or _vertex_inside(tried) else EDGE
    if not complete:
        return UNCHECKED
    if tried.x[0] == 0 or tried.x[-1] == 0:
        return ONE_SIDED
    own = int(np.flatnonzero(tried.x == 0)[0])
    beside = [each for each in (own - 1, own + 1) if 0 <= each < len(tried.x)]
    worse = [tried.change[each] > tried.quantile * tried.errors[each] for each in beside]
    return BRACKETED if len(beside) == 2 and all(worse) else FLAT


def _outward(tried: _Tried) -> list[float]:
    """The next factor beyond the best one, in log2."""
    edge = tried.x[tried.best]
    return [float(edge - 1)] if tried.best == 0 else [float(edge + 1)]


def _triple(tried: _Tried) -> slice | None:
    """The best factor and its neighbours, or the last three; None where they are no parabola."""
    if len(tried.x) < 3:
        return None
    middle = min(max(tried.best, 1), len(tried.x) - 2)
    near = slice(middle - 1, middle + 2)
    return near if np.isfinite(tried.change[near]).all() else None


def _parabola(tried: _Tried) -> tuple[Array, float, float] | None:
    """Lowest point of the parabola, within reach: its weights on the changes, place, curvature."""
    near = _triple(tried)
    if near is None:
        return None
    inverse = np.linalg.inv(np.vander(tried.x[near], increasing=True))
    _, slope, curvature = inverse @ tried.change[near]
    if curvature <= 0:
        return None
    lowest = -slope / (2 * curvature)
    if not tried.x[0] - BEYOND < lowest < tried.x[-1] + BEYOND:
        return None
    return inverse, float(lowest), float(curvature)


def _vertex_inside(tried: _Tried) -> bool:
    return _parabola(tried) is not None


def _estimate(tried: _Tried) -> tuple[float, float, float]:
    """The gap, its standard error, and log2 of the factor with the lowest loss.

    The lowest point of noisy runs flatters: a parabola's is too low by var(slope) / (4 curvature)
    on average, the best of equal runs by the expected maximum of as many normal numbers.
    """
    found, near = _parabola(tried), _triple(tried)
    if found is not None and near is not None:
        inverse, lowest, curvature = found
        inside = tried.covariance[near, near]
        bend = float(np.sqrt(inverse[2] @ inside @ inverse[2]))
        # A curvature that noise alone may make says nothing of where the lowest point lies.
        if curvature > tried.quantile * bend:
            at = np.array([1.0, lowest, lowest**2]) @ inverse
            slope = np.array([0.0, 1.0, 2 * lowest]) @ inverse
            flattered = float(slope @ inside @ slope) / (4 * curvature)
            gap = -float(at @ tried.change[near]) - flattered
            variance = float(at @ inside @ at) + 2 * flattered**2
            return max(0.0, gap), math.sqrt(variance), lowest
    others = tried.errors[tried.errors > 0]
    error = float(others.max()) if len(others) else 0.0
    gain, best = -float(tried.change[tried.best]), float(tried.x[tried.best])
    if tried.clearly_better:
        return gain, error, best
    flattered = _expected_best(len(tried.x)) * error / math.sqrt(2)
    return max(0.0, gain - flattered), error, 0.0 if gain <= flattered else best


def _highest(tried: _Tried) -> float:
    """Upper end of the gap's interval: that of the gap at the place where it is largest.

    A gap is skewed: where its estimate is too low so is its error. At the true optimum, wherever
    that is, the error of the parabola is known, so the largest end over all places is enough.
    """
    near = _triple(tried)
    if near is None:
        return -math.inf
    found = _parabola(tried)
    reach = np.append(tried.x, tried.x if found is None else found[1])
    places = np.linspace(reach.min(), reach.max(), PLACES)
    inverse = np.linalg.inv(np.vander(tried.x[near], increasing=True))
    at = np.vander(places, 3, increasing=True) @ inverse
    errors = np.sqrt(np.einsum("ij,jk,ik->i", at, tried.covariance[near, near], at))
    return float((-at @ tried.change[near] + tried.quantile * errors).max())


def _expected_best(count: int) -> float:
    """Expected maximum of independent standard normal numbers."""
    x = np.linspace(-8.0, 8.0, 4001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    return float(np.sum(count * x * density * below ** (count - 1)) * (x[1] - x[0]))
