"""The noise between seeds, and the smallest effect that a study can detect."""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.effects.contrasts import OTHER_FACTOR, Contrast
from analysis.inference.intervals import Interval, t_quantile
from analysis.tables.frames import floats, groups, keep, means
from analysis.tables.run_table import SEEDS
from analysis.validity.refusal import Refusal

CELL = ["architecture", "corpus", "rung"]
ASSUMED_SEED_SD = 0.006
"""Standard deviation of ln L between seeds where a study has no two seeds of a cell."""
VARIED = {
    (True, True): "weights and order of samples",
    (True, False): "initial weights alone",
    (False, True): "order of samples alone",
}
"""What differs between two runs of a cell: their seeds of weights, their seeds of order."""


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of ln L between runs that differ by seeds alone.

    Attributes:
        varied: what those seeds change, a value of VARIED.
    """

    sd: Interval
    freedom: int
    varied: str


@dataclass(frozen=True)
class Detectable:
    """The smallest effect on ln L that this study detects with 80 % power."""

    value: float
    basis: str


def seed_noise(rows: pd.DataFrame) -> SeedNoise | Refusal:
    """Pooled standard deviation of ln L between seeds; horizons of a trunk count once.

    Half the mean squared difference of two runs is the variance of one. Only pairs that differ in
    both seeds carry the noise of weights and of order; without any, those that differ in one stand
    in, and the result says so.
    """
    spread = pd.DataFrame(
        [
            {**dict(zip(CELL, key, strict=False)), **found}
            for key, cell in groups(rows, [*CELL, "tokens"])
            for found in _spreads(cell)
        ]
    )
    if not len(spread):
        return Refusal(
            "R-SEED",
            "no cell was run with two seeds, so the noise between seeds is unknown",
            "run a second seed at two sizes",
        )
    varied = next(each for each in VARIED.values() if each in set(spread["varied"]))
    chosen = keep(spread, spread["varied"] == varied)
    trunks = means(chosen, CELL, ["variance", "freedom"])
    freedom = floats(trunks, "freedom")
    variance = float((floats(trunks, "variance") * freedom).sum() / freedom.sum())
    total = round(float(freedom.sum()))
    low, high = (np.sqrt(variance * total / stats.chi2.ppf(tail, total)) for tail in (0.975, 0.025))
    method = f"chi-square interval, {total} degrees of freedom"
    return SeedNoise(
        Interval(float(np.sqrt(variance)), float(low), float(high), method), total, varied
    )


def _spreads(cell: pd.DataFrame) -> list[dict[str, object]]:
    """The variance of ln L between the runs of one cell, for each way in which two may differ."""
    seeds, logs = cell[SEEDS].to_numpy(), np.log(floats(cell, "loss_nats"))
    squares: dict[str, list[float]] = {}
    for a, b in itertools.combinations(range(len(cell)), 2):
        varied = VARIED.get((seeds[a][0] != seeds[b][0], seeds[a][1] != seeds[b][1]))
        if varied:
            squares.setdefault(varied, []).append((logs[a] - logs[b]) ** 2 / 2)
    levels = [len(set(column)) for column in seeds.T]
    return [
        # Crossed seeds share levels: the smaller number of levels is what is independent.
        {"varied": varied, "variance": float(np.mean(each)),
         "freedom": (min(levels) if varied == VARIED[True, True] else max(levels)) - 1}
        for varied, each in squares.items()
    ]  # fmt: skip


def detectable(contrast: Contrast | Refusal, noise: SeedNoise | Refusal) -> Detectable | Refusal:
    """The effect detected with 80 % power at 95 % confidence, given this contrast's pairs."""
    if isinstance(contrast, Refusal):
        return contrast
    sizes = len(contrast.by_size)
    quantiles = t_quantile(sizes - 1) + float(stats.t.ppf(0.8, sizes - 1))
    if isinstance(noise, Refusal):
        variance = contrast.by_size.var(ddof=1) / sizes
        basis = "the scatter between sizes, as no cell has two seeds"
    else:
        held = OTHER_FACTOR[contrast.factor]
        independent = len(contrast.pairs[[held, "rung", *SEEDS]].drop_duplicates())
        variance = 2 * noise.sd.estimate**2 / independent
        basis = f"the sd between seeds and {independent} pairs of trunks at {sizes} sizes"
    documents, tuning = contrast.evaluation_error, contrast.tuning_error
    if documents is not None:
        variance += documents.error**2
        basis += f", and {documents.source} of the evaluation set"
    if tuning is not None:
        variance += tuning.error**2
        basis += f", and {tuning.source}"
    return Detectable(float(quantiles * np.sqrt(variance)), basis)
