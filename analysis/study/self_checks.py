"""What a reader would check of a study's numbers before believing them, checked by the study.

Each check is on the neutral set: losses fall with size, the largest size is forecast by the
others, exponents are believable, and the best model is not beaten by counting n-grams.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.seed_noise import ASSUMED_SEED_SD, SeedNoise, seed_noise
from analysis.fitting.estimator import Fit
from analysis.inference.scaling_law import ScalingLaw
from analysis.laws.catalog import nested_family
from analysis.study.study import CELL, JOINT, FittedLaw, Study
from analysis.tables.frames import floats, groups, keep, means, strings, where
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal

ALLOWED_FORECAST_ERROR = 0.03
ALLOWED_ABOVE_NGRAM = 0.03
LARGEST_EXPONENT = 1.0


@dataclass(frozen=True)
class Check:
    """One check; `passed` is None where the study has not what it takes."""

    name: str
    passed: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not possible" if self.passed is None else "passed" if self.passed else "failed"


def self_checks(study: Study) -> list[Check]:
    """All checks; none for a search over learning rates."""
    if study.rate_search is not None or not len(study.points.rows):
        return []
    rows = where(study.points.rows, "evaluation_set", study.table.neutral_set)
    neutral = [law for law in study.cells if law.evaluation_set == study.table.neutral_set]
    return [
        falls_with_size(rows),
        forecast_of_the_largest(rows),
        believable_exponents(neutral),
        against_ngrams(rows, study.table),
    ]


def falls_with_size(rows: pd.DataFrame) -> Check:
    """Whether loss falls with N at every budget of every cell, beyond the noise between seeds."""
    name = "Loss falls with size at every budget, by more than the noise between seeds"
    noise = seed_noise(rows)
    sd = noise.sd.estimate if isinstance(noise, SeedNoise) else ASSUMED_SEED_SD
    rises, flat, compared = [], [], 0
    for key, cell in groups(rows, [*CELL, "tokens"]):
        sizes = _by_size(cell)
        if len(sizes) < 2:
            continue
        compared += 1
        logs, runs = floats(sizes, "log_loss"), floats(sizes, "runs")
        steps = np.diff(logs)
        allowed = 1.96 * sd * np.sqrt(1 / runs[1:] + 1 / runs[:-1])
        place = f"{key[0]} on {key[1]} at {_millions(float(key[2]))} tokens"
        names = strings(sizes, "rung")
        rises += [
            f"{place}, {names[i]} to {names[i + 1]}: {100 * np.expm1(steps[i]):+.1f} %"
            for i in np.flatnonzero(steps > allowed)
        ]
        if logs[0] - logs[-1] <= 1.96 * sd * np.sqrt(1 / runs[0] + 1 / runs[-1]):
            flat.append(place)
    if not compared:
        return Check(name, None, "one size only")
    problems = [*(f"it rises: {each}" for each in rises), *(f"no fall: {each}" for each in flat)]
    source = "measured" if isinstance(noise, SeedNoise) else "assumed, as no cell has two seeds"
    told = f"{compared} series of sizes; sd between seeds {100 * sd:.2g} %, {source}"
    return Check(name, not problems, "; ".join([told, *problems]))


def _by_size(cell: pd.DataFrame) -> pd.DataFrame:
    cell = cell.assign(log_loss=np.log(floats(cell, "loss_nats")))
    sizes = means(cell, ["rung"], ["parameters", "log_loss"])
    runs = cell.groupby("rung").size().reindex(sizes.index)
    return sizes.assign(runs=runs).sort_values("parameters").reset_index()


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:.3g} M"


def forecast_of_the_largest(rows: pd.DataFrame) -> Check:
    """Whether the largest size is forecast by a law fitted to the smaller ones."""
    name = "The largest size, held out, is forecast by the others within 3 % and its interval"
    sizes = means(rows, ["rung"], ["parameters"]).sort_values("parameters").reset_index()
    if len(sizes) < 4:
        return Check(name, None, f"{len(sizes)} sizes; it takes four")
    largest = strings(sizes, "rung")[-1]
    fitted = ScalingLaw(nested_family(CELL)[JOINT]).fit(
        keep(rows, strings(rows, "rung") != largest).reset_index(drop=True)
    )
    held = where(rows, "rung", largest).reset_index(drop=True)
    predicted = fitted.predict(held)
    if isinstance(predicted, Refusal):
        return Check(name, None, predicted.reason)
    observed = floats(held, "loss_nats")
    errors = observed / floats(predicted, "estimate") - 1
    inside = (observed >= floats(predicted, "low")) & (observed <= floats(predicted, "high"))
    worst = int(np.argmax(np.abs(errors)))
    run = held.iloc[worst]
    detail = (
        f"{largest}: {int(inside.sum())} of {len(held)} runs inside their 95 % intervals; the "
        f"largest error is {100 * errors[worst]:+.1f} % ({run['architecture']} on {run['corpus']} "
        f"at {_millions(float(floats(held, 'tokens')[worst]))} tokens)"
    )
    return Check(
        name, bool(inside.all() and np.abs(errors).max() <= ALLOWED_FORECAST_ERROR), detail
    )


def believable_exponents(cells: list[FittedLaw]) -> Check:
    """Whether each cell's exponents are at most 1, and no interval excludes those of all others."""
    name = "Every cell's exponents are below 1, and no cell's interval excludes all others'"
    problems, identified = [], 0
    found: dict[str, list[tuple[str, float, float]]] = {"alpha": [], "beta": []}
    for law in cells:
        if not isinstance(law.fit, Fit):
            continue
        for label, ranges in found.items():
            interval = law.intervals.get(label)
            if interval is None or isinstance(interval, Refusal):
                continue
            identified += 1
            ranges.append((law.part, interval.low, interval.high))
            if interval.estimate > LARGEST_EXPONENT:
                problems.append(f"{label} of {law.part} is {interval.estimate:.2f}")
    for label, ranges in found.items():
        for part, low, high in ranges:
            others = [(a, b) for name_, a, b in ranges if name_ != part]
            if len(others) > 1 and all(high < a or low > b for a, b in others):
                problems.append(
                    f"{label} of {part} [{low:.2f}, {high:.2f}] excludes the others' intervals"
                )
    if not cells:
        return Check(name, None, "no cell has a law")
    told = f"{identified} of {2 * len(cells)} exponents identified, the others refused"
    return Check(name, not problems, "; ".join([told, *problems]))


def against_ngrams(rows: pd.DataFrame, table: Table) -> Check:
    """Whether the best model comes within 3 % of the n-gram of the highest order, or below it."""
    name = "The best model is within 3 % of an n-gram of the same text, or below it"
    baselines = where(table.baselines, "evaluation_set", table.neutral_set)
    if not len(baselines):
        return Check(name, None, "no n-gram was fitted; ask for it with baselines: [5]")
    order = int(floats(baselines, "order").max())
    shown, passed = [], True
    for (corpus,), mine in groups(keep(baselines, baselines["order"] == order), ["corpus"]):
        runs = where(rows, "corpus", str(corpus))
        if not len(runs):
            continue
        ngram = float(floats(mine, "total_nats")[0] / floats(mine, "targets")[0])
        best = runs.iloc[int(np.argmin(floats(runs, "loss_nats")))]
        ratio = float(best["loss_nats"]) / ngram - 1
        passed = passed and ratio <= ALLOWED_ABOVE_NGRAM
        shown.append(
            f"on {corpus}, {best['architecture']} at {best['rung']} has {best['loss_nats']:.3f} "
            f"nats, the {order}-gram {ngram:.3f} ({100 * ratio:+.1f} %)"
        )
    return Check(name, passed if shown else None, "; ".join(shown))
