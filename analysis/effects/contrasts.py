"""The question itself: effects of corpus and of architecture from matched pairs of runs.

An effect is a mean difference of ln L between runs that agree in everything else. Pairs are
averaged inside each size first; sizes are the independent clusters of the interval.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.inference.bootstrap import Interval, ratio_interval, t_interval, t_quantile
from analysis.laws.law import Array
from analysis.tables.frames import floats, keep, means, where
from analysis.tables.run_table import FLOP_CONVENTIONS, Table
from analysis.validity.refusal import Refusal

PLACE = ["rung", "tokens", "seed"]
OTHER_FACTOR = {"corpus": "architecture", "architecture": "corpus"}


@dataclass(frozen=True)
class Contrast:
    """The effect on ln L of one level of a factor against the baseline level.

    Attributes:
        effect: mean difference of ln L, other minus baseline; positive means a higher loss.
        nats: the same for the loss itself [nats per token].
        pairs: the matched pairs, a row each, with `difference`, `nats` and `same_samples`.
        by_size: mean difference of ln L at each size, the clusters of the interval.
        matching: what the two runs of a pair have in common.
    """

    factor: str
    baseline: str
    other: str
    evaluation_set: str
    effect: Interval
    nats: Interval
    pairs: pd.DataFrame
    by_size: pd.Series
    matching: str

    @property
    def percent(self) -> Interval:
        """The effect as a percentage of the baseline's loss."""
        return self.effect.mapped(lambda value: 100 * float(np.expm1(value)))


@dataclass(frozen=True)
class Noise:
    """Standard deviation of ln L between runs that differ by seed alone."""

    sd: Interval
    freedom: int


@dataclass(frozen=True)
class Detectable:
    """The smallest difference of ln L that this study finds in four of five repetitions."""

    value: float
    basis: str


@dataclass(frozen=True)
class Arm:
    """One architecture against the baseline; each part is a value or a refusal.

    Attributes:
        interaction: how much the effect differs between the first two corpora.
        ratio: the first corpus effect over this architecture effect, both without sign.
        flops: per FLOP convention, the effect at equal training FLOPs.
        sign_changes: whether the effect changes sign between ways of counting.
    """

    contrast: Contrast | Refusal
    interaction: Interval | Refusal
    ratio: Interval | Refusal
    flops: dict[str, Contrast | Refusal]
    sign_changes: bool


@dataclass(frozen=True)
class Answer:
    """Data against architecture on one evaluation set; each part is a value or a refusal."""

    evaluation_set: str
    corpus: tuple[Contrast | Refusal, ...]
    arms: tuple[Arm, ...]
    noise: Noise | Refusal
    detectable: dict[str, Detectable | Refusal]

    @property
    def architecture(self) -> tuple[Contrast | Refusal, ...]:
        """The architecture contrasts alone."""
        return tuple(arm.contrast for arm in self.arms)


def answer(table: Table, evaluation_set: str) -> Answer:
    """Compare corpora and architectures on one evaluation set of a final table."""
    rows = where(table.rows, "evaluation_set", evaluation_set)
    corpus = contrasts(table, "corpus", evaluation_set)
    architecture = contrasts(table, "architecture", evaluation_set)
    noise = seed_noise(rows)
    first = {"corpus": corpus[0], "architecture": architecture[0]}
    return Answer(
        evaluation_set=evaluation_set,
        corpus=corpus,
        arms=tuple(_arm(table.levels("corpus"), rows, corpus[0], each) for each in architecture),
        noise=noise,
        detectable={name: detectable(value, noise) for name, value in first.items()},
    )


def _arm(
    corpora: list[str],
    rows: pd.DataFrame,
    corpus: Contrast | Refusal,
    contrast: Contrast | Refusal,
) -> Arm:
    if isinstance(contrast, Refusal):
        refused = dict.fromkeys(FLOP_CONVENTIONS, contrast)
        return Arm(contrast, contrast, contrast, {**refused}, False)
    flops = {name: _at_equal_flops(rows, contrast, name) for name in FLOP_CONVENTIONS}
    return Arm(
        contrast=contrast,
        interaction=_interaction(corpora, contrast),
        ratio=_ratio(corpus, contrast),
        flops=flops,
        sign_changes=_sign_changes([contrast, *flops.values()]),
    )


def contrasts(table: Table, factor: str, evaluation_set: str) -> tuple[Contrast | Refusal, ...]:
    """Every level of a factor against its first level, on one evaluation set."""
    levels = table.levels(factor)
    if len(levels) < 2:
        found = levels[0] if levels else "none"
        return (
            Refusal("R-FACTOR", f"one {factor} only so far ({found})", f"add a second {factor}"),
        )
    rows = where(table.rows, "evaluation_set", evaluation_set)
    refusal = _unfit_for_pairing(rows)
    if refusal:
        return (refusal,)
    return tuple(
        _summarise(
            factor, (levels[0], other), evaluation_set, _pairs(rows, factor, levels[0], other)
        )
        for other in levels[1:]
    )


def seed_noise(rows: pd.DataFrame) -> Noise | Refusal:
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
    return Noise(Interval(float(np.sqrt(variance)), float(low), float(high), method), total)


def detectable(contrast: Contrast | Refusal, noise: Noise | Refusal) -> Detectable | Refusal:
    """The difference found with 80 % power at 95 % confidence, by this contrast's pairs."""
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


def _unfit_for_pairing(rows: pd.DataFrame) -> Refusal | None:
    if len(rows[["targets", "utf8_bytes"]].drop_duplicates()) > 1:
        return Refusal(
            "R-YARDSTICK",
            "runs were evaluated on different numbers of targets or bytes",
            "evaluate all runs on one set with one tokenizer",
        )
    doubled = rows.duplicated(["architecture", "corpus", *PLACE])
    if doubled.any():
        place = rows.loc[doubled.idxmax(), ["architecture", "corpus", *PLACE]]
        return Refusal(
            "R-AMBIGUOUS",
            f"two runs share {', '.join(str(part) for part in place)}",
            "report one setting of the other choices at a time",
        )
    return None


def _pairs(rows: pd.DataFrame, factor: str, baseline: str, other: str) -> pd.DataFrame:
    """One row per pair of runs that differ in the factor alone."""
    held = OTHER_FACTOR[factor]
    kept = ["loss_nats", "certificate", "parameters"]
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


def _summarise(
    factor: str, levels: tuple[str, str], evaluation_set: str, pairs: pd.DataFrame
) -> Contrast | Refusal:
    sizes = means(pairs, ["rung"], ["difference", "nats", "parameters"]).sort_values("parameters")
    by_size = pd.Series(floats(sizes, "difference"), index=sizes.index, name="difference")
    effect = t_interval(floats(sizes, "difference"), "sizes")
    nats = t_interval(floats(sizes, "nats"), "sizes")
    if isinstance(effect, Refusal) or isinstance(nats, Refusal):
        return effect if isinstance(effect, Refusal) else nats  # type: ignore[return-value]
    same = int(floats(pairs, "same_samples").sum())
    matching = "equal seed, size and tokens; not paired by sample, as the data differ"
    if factor == "architecture":
        matching = "paired: the same samples in the same amounts"
        if same < len(pairs):
            matching = f"not paired: {len(pairs) - same} of {len(pairs)} pairs saw other samples"
    return Contrast(factor, *levels, evaluation_set, effect, nats, pairs, by_size, matching)


def _interaction(corpora: list[str], contrast: Contrast) -> Interval | Refusal:
    """How much an architecture effect differs between the first two corpora."""
    if len(corpora) < 2:
        return Refusal("R-FACTOR", "an interaction needs two corpora", "add a second corpus")
    wide = contrast.pairs.pivot(index=PLACE, columns="corpus", values="difference")
    wide = wide.reindex(columns=corpora[:2]).dropna().reset_index()
    wide = wide.assign(difference=wide[corpora[1]] - wide[corpora[0]])
    return t_interval(floats(means(wide, ["rung"], ["difference"]), "difference"), "sizes")


def _ratio(corpus: Contrast | Refusal, architecture: Contrast) -> Interval | Refusal:
    if isinstance(corpus, Refusal):
        return corpus
    both = pd.concat([corpus.by_size, architecture.by_size], axis=1, join="inner").to_numpy()
    return ratio_interval(both[:, 0], both[:, 1])


def _at_equal_flops(rows: pd.DataFrame, contrast: Contrast, convention: str) -> Contrast | Refusal:
    """The architecture effect where both arms have spent the same FLOPs.

    The baseline's ln L is interpolated in ln FLOPs along its horizons (a parabola through the
    nearest three, as a chord lies above a convex curve), never beyond them.
    """
    levels = (contrast.baseline, contrast.other)
    keys = ["corpus", "rung", "seed"]
    pairs = []
    for place in rows[keys].drop_duplicates().itertuples(index=False):
        here = keep(rows, (rows[keys] == list(place)).all(axis=1))
        sides = [where(here, "architecture", level).sort_values(convention) for level in levels]
        pairs += _interpolated_pairs(sides[0], sides[1], convention)
    if not pairs:
        return Refusal(
            "R-REACH",
            "no size has both arms at equal FLOPs inside their horizons",
            "add horizons so that the arms' ranges of FLOPs overlap",
        )
    return _summarise("architecture", levels, contrast.evaluation_set, pd.DataFrame(pairs))


def _interpolated_pairs(
    baseline: pd.DataFrame, other: pd.DataFrame, convention: str
) -> list[dict[str, object]]:
    if len(baseline) < 2:
        return []
    known = np.log(baseline[[convention, "loss_nats"]].to_numpy(dtype=np.float64))
    pairs = []
    for row in other.to_dict("records"):
        at = np.log(row[convention])
        if not known[0, 0] <= at <= known[-1, 0]:
            continue
        near = known[np.argsort(np.abs(known[:, 0] - at))[:3]]
        curve = np.polyfit(near[:, 0] - at, near[:, 1], len(near) - 1)
        loss = float(np.exp(curve[-1]))
        pairs.append(
            {
                "corpus": row["corpus"],
                "rung": row["rung"],
                "seed": row["seed"],
                "tokens": row["tokens"],
                "parameters": row["parameters"],
                "difference": float(np.log(row["loss_nats"] / loss)),
                "nats": row["loss_nats"] - loss,
                "same_samples": False,
            }
        )
    return pairs


def _sign_changes(found: list[Contrast | Refusal]) -> bool:
    signs: Array = np.sign([each.effect.estimate for each in found if isinstance(each, Contrast)])
    return len(set(signs.tolist()) - {0.0}) > 1


def every_set(table: Table) -> dict[str, dict[str, tuple[Contrast | Refusal, ...]]]:
    """Contrasts of both factors on every evaluation set, the neutral one first."""
    names = [str(name) for name in table.rows["evaluation_set"].unique()]
    names.sort(key=lambda name: (name != table.neutral_set, name))
    return {
        name: {factor: contrasts(table, factor, name) for factor in OTHER_FACTOR} for name in names
    }
