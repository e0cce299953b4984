"""The noise between seeds, and the smallest effect that a study can detect."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.effects.contrasts import OTHER_FACTOR, Contrast
from analysis.inference.intervals import Interval, t_quantile
from analysis.tables.frames import floats, keep, means
from analysis.validity.refusal import Refusal


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of ln L between runs that differ by seed alone."""

    sd: Interval
    freedom: int


@dataclass(frozen=True)
class Detectable:
    """The smallest effect on ln L that this study detects with 80 % power."""

    value: float
    basis: str


def seed_noise(rows: pd.DataFrame) -> SeedNoise | Refusal:
    """Pooled standard deviation of ln L between seeds; horizons of a trunk count once."""
    logs = rows.assign(ln_loss=np.log(rows["loss_nats"]))
    cells = logs.groupby(["architecture", "corpus", "rung", "tokens"])["ln_loss"]
    spread = pd.DataFrame({"variance": cells.var(ddof=1), "seeds": cells.count()}).reset_index()
    spread = keep(spread, spread["seeds"] >= 2)
    if not len(spread):
        return Refusal(
            "R-SEED",
            "no cell was run with two seeds, so the noise between seeds is unknown",
            "run a second seed at two sizes",
        )
    trunks = means(spread, ["architecture", "corpus", "rung"], ["variance", "seeds"])
    freedom = floats(trunks, "seeds") - 1
    variance = float((floats(trunks, "variance") * freedom).sum() / freedom.sum())
    total = round(float(freedom.sum()))
    low, high = (np.sqrt(variance * total / stats.chi2.ppf(tail, total)) for tail in (0.975, 0.025))
    method = f"chi-square interval, {total} degrees of freedom"
    return SeedNoise(Interval(float(np.sqrt(variance)), float(low), float(high), method), total)


def detectable(contrast: Contrast | Refusal, noise: SeedNoise | Refusal) -> Detectable | Refusal:
    """The effect detected with 80 % power at 95 % confidence, given this contrast's pairs."""
    if isinstance(contrast, Refusal):
        return contrast
    sizes = len(contrast.by_size)
    quantiles = t_quantile(sizes - 1) + float(stats.t.ppf(0.8, sizes - 1))
    if isinstance(noise, Refusal):
        error = contrast.by_size.std(ddof=1) / np.sqrt(sizes)
        basis = "the scatter between sizes, as no cell has two seeds"
        return Detectable(float(quantiles * error), basis)
    held = OTHER_FACTOR[contrast.factor]
    independent = len(contrast.pairs[[held, "rung", "seed"]].drop_duplicates())
    basis = f"the sd between seeds and {independent} pairs of trunks at {sizes} sizes"
    return Detectable(float(quantiles * noise.sd.estimate * np.sqrt(2 / independent)), basis)
