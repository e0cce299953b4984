"""Effects of corpus and of architecture, from matched pairs of runs.

An effect is a mean difference of ln L between runs that agree in everything else. Pairs are
averaged inside each size first; sizes are the independent clusters of the interval, which takes
the documents of the evaluation set as a sample too.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.evaluation_error import Influence, influence, shared_error
from analysis.inference.intervals import Interval, SharedError, t_interval
from analysis.tables.frames import columns_of, floats, means, where
from analysis.tables.run_table import SEEDS, Table
from analysis.validity.refusal import Refusal

PLACE = ["rung", "tokens", *SEEDS]
OTHER_FACTOR = {"corpus": "architecture", "architecture": "corpus"}


@dataclass(frozen=True)
class Contrast:
    """The effect on ln L of one level of a factor against the baseline level.

    Attributes:
        effect: mean difference of ln L, other minus baseline; positive means a higher loss.
        nats: the same for the loss itself [nats per token].
        pairs: the matched pairs, a row each, with `difference`, `nats` and `same_samples`.
        by_size: mean difference of ln L at each size, the clusters of the interval.
        influence: of each document of the evaluation set; None if losses by document are not known,
            and then the interval takes the set as it is.
        matching: what the two runs of a pair have in common.
        tuning_error: of the effect on ln L, from the probes of both arms; None without probes.
    """

    factor: str
    baseline: str
    other: str
    evaluation_set: str
    effect: Interval
    nats: Interval
    pairs: pd.DataFrame
    by_size: pd.Series
    influence: Influence | None
    matching: str
    tuning_error: SharedError | None = None

    @property
    def evaluation_error(self) -> SharedError | None:
        """The standard error of the effect on ln L that the set's documents leave."""
        return None if self.influence is None else shared_error(self.influence.logs)

    @property
    def open_ended(self) -> bool:
        """Whether the effect is known to one side alone, as an arm's tuning is not bracketed."""
        return not np.isfinite([self.effect.low, self.effect.high]).all()

    @property
    def percent(self) -> Interval:
        """The effect as a percentage of the baseline's loss."""
        with np.errstate(over="ignore"):
            return self.effect.mapped(lambda value: 100 * float(np.expm1(value)))

    @property
    def percent_by_size(self) -> pd.DataFrame:
        """The effect at each size in percent, from the smallest size up, with its parameters."""
        sizes = means(self.pairs, ["rung"], ["difference", "parameters"])
        sizes = sizes.assign(
            pairs=self.pairs.groupby("rung").size(), percent=100 * np.expm1(sizes["difference"])
        )
        columns = ["rung", "parameters", "percent", "pairs"]
        return columns_of(sizes.sort_values("parameters").reset_index(), columns)


def contrasts(table: Table, factor: str, evaluation_set: str) -> tuple[Contrast | Refusal, ...]:
    """Every level of a factor against its first level, on one evaluation set."""
    levels = table.levels(factor)
    if len(levels) < 2:
        found = levels[0] if levels else "none"
        return (
            Refusal("R-FACTOR", f"one {factor} only so far ({found})", f"add a second {factor}"),
        )
    rows = where(table.rows, "evaluation_set", evaluation_set)
    refusal = _not_comparable(rows)
    if refusal:
        return (refusal,)
    found = []
    for other in levels[1:]:
        pairs = _pairs(rows, factor, levels[0], other)
        by_document = influence(pairs, table.documents, evaluation_set)
        found.append(summarise(factor, (levels[0], other), evaluation_set, pairs, by_document))
    return tuple(found)


def _not_comparable(rows: pd.DataFrame) -> Refusal | None:
    if len(rows[["targets", "utf8_bytes"]].drop_duplicates()) > 1:
        return Refusal(
            "R-EVAL",
            "runs were evaluated on different numbers of targets or bytes",
            "evaluate all runs on one set with one tokenizer",
        )
    doubled = rows.duplicated(["architecture", "corpus", *PLACE])
    if doubled.any():
        place = rows.loc[doubled.idxmax(), ["architecture", "corpus", *PLACE]]
        return Refusal(
            "R-AMBIGUOUS",
            f"two runs share {', '.join(str(part) for part in place)}",
            "report runs that differ in other settings separately",
        )
    return None


def _pairs(rows: pd.DataFrame, factor: str, baseline: str, other: str) -> pd.DataFrame:
    """One row per pair of runs that differ in the factor alone."""
    held = OTHER_FACTOR[factor]
    kept = ["run_id", "loss_nats", "certificate", "parameters"]
    sides = [
        where(rows, factor, level).set_index([held, *PLACE])[kept].add_suffix(suffix)
        for level, suffix in ((baseline, "_baseline"), (other, "_other"))
    ]
    both = sides[0].join(sides[1], how="inner").reset_index()
    known = both["certificate_baseline"].notna()
    return both.assign(
        difference=np.log(both["loss_nats_other"] / both["loss_nats_baseline"]),
        nats=both["loss_nats_other"] - both["loss_nats_baseline"],
        same_samples=known & (both["certificate_baseline"] == both["certificate_other"]),
        parameters=both["parameters_baseline"],
    )


def summarise(
    factor: str,
    levels: tuple[str, str],
    evaluation_set: str,
    pairs: pd.DataFrame,
    by_document: Influence | None,
    tuning: tuple[SharedError | None, SharedError | None] = (None, None),
) -> Contrast | Refusal:
    """Average matched pairs inside each size, then over sizes, which are the clusters.

    `tuning` is the error of the effect on ln L, and on the loss, that probes leave.
    """
    sizes = means(pairs, ["rung"], ["difference", "nats", "parameters"]).sort_values("parameters")
    by_size = pd.Series(floats(sizes, "difference"), index=sizes.index, name="difference")
    shared = (None, None) if by_document is None else (by_document.logs, by_document.nats)
    effect, nats = (
        t_interval(
            floats(sizes, name), "sizes", None if each is None else shared_error(each), tuned
        )
        for name, each, tuned in zip(("difference", "nats"), shared, tuning, strict=True)
    )
    if isinstance(effect, Refusal):
        return effect
    if isinstance(nats, Refusal):
        return nats
    same = int(floats(pairs, "same_samples").sum())
    matching = "equal seeds, size and tokens; not paired by sample, as the data differ"
    if factor == "architecture":
        matching = "paired: the same samples in the same amounts"
        if same < len(pairs):
            matching = f"not paired: {len(pairs) - same} of {len(pairs)} pairs saw other samples"
    return Contrast(
        factor, *levels, evaluation_set, effect, nats, pairs, by_size, by_document, matching,
        tuning[0],
    )  # fmt: skip


def every_set(table: Table) -> dict[str, dict[str, tuple[Contrast | Refusal, ...]]]:
    """Contrasts of both factors on every evaluation set, the neutral one first."""
    names = [str(name) for name in table.rows["evaluation_set"].unique()]
    names.sort(key=lambda name: (name != table.neutral_set, name))
    return {
        name: {factor: contrasts(table, factor, name) for factor in OTHER_FACTOR} for name in names
    }
