"""Data against architecture on one evaluation set: contrasts, interaction, ratio, seed noise."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.effects.contrasts import PLACE, Contrast, contrasts
from analysis.effects.equal_compute import at_equal_flops
from analysis.effects.evaluation_error import covariance, influence, shared_error
from analysis.effects.seed_noise import Detectable, SeedNoise, detectable, seed_noise
from analysis.effects.tuned_contrast import tuned_contrast
from analysis.effects.tuning import Gap, probe_noise, tuning_gaps
from analysis.inference.intervals import Interval, ratio_interval, t_interval
from analysis.tables.frames import Array, floats, means, where
from analysis.tables.run_table import FLOP_CONVENTIONS, Table
from analysis.validity.refusal import Refusal


@dataclass(frozen=True)
class Arm:
    """One architecture against the baseline; each part is a value or a refusal.

    Attributes:
        tuned: the contrast corrected for the tuning of both arms; as measured without probes.
        interaction: how much the effect differs between the first two corpora.
        ratio: the first corpus effect over the tuned architecture effect, both without sign.
        flops: per FLOP convention, the effect at equal training FLOPs.
        sign_changes: whether the effect changes sign between ways of counting.
    """

    contrast: Contrast | Refusal
    tuned: Contrast | Refusal
    interaction: Interval | Refusal
    ratio: Interval | Refusal
    flops: dict[str, Contrast | Refusal]
    sign_changes: bool


@dataclass(frozen=True)
class Answer:
    """Data against architecture on one evaluation set; each part is a value or a refusal.

    Attributes:
        gaps: what tuning probes say of each arm's rate and batch; empty without probes.
        probe_sd: standard deviation of ln L of one run behind the gaps' intervals.
    """

    evaluation_set: str
    corpus: tuple[Contrast | Refusal, ...]
    arms: tuple[Arm, ...]
    noise: SeedNoise | Refusal
    detectable: dict[str, Detectable | Refusal]
    gaps: tuple[Gap, ...] = ()
    probe_sd: float = 0.0

    @property
    def architecture(self) -> tuple[Contrast | Refusal, ...]:
        """The architecture contrasts alone, as measured."""
        return tuple(arm.contrast for arm in self.arms)


def answer(table: Table, evaluation_set: str) -> Answer:
    """Compare corpora and architectures on one evaluation set of a final table."""
    rows = where(table.rows, "evaluation_set", evaluation_set)
    corpus = contrasts(table, "corpus", evaluation_set)
    architecture = contrasts(table, "architecture", evaluation_set)
    noise = seed_noise(rows)
    gaps = tuning_gaps(table) if evaluation_set == table.neutral_set else ()
    probed = probe_noise(table)
    arms = tuple(
        _arm(table, rows, corpus[0], each, (gaps, probed.freedom)) for each in architecture
    )
    tuned = arms[0].tuned
    first = {
        "corpus": corpus[0],
        "architecture": tuned if isinstance(tuned, Contrast) else architecture[0],
    }
    return Answer(
        evaluation_set=evaluation_set,
        corpus=corpus,
        arms=arms,
        noise=noise,
        detectable={name: detectable(value, noise) for name, value in first.items()},
        gaps=gaps,
        probe_sd=probed.sd,
    )


def _arm(
    table: Table,
    rows: pd.DataFrame,
    corpus: Contrast | Refusal,
    contrast: Contrast | Refusal,
    tuning: tuple[tuple[Gap, ...], int],
) -> Arm:
    if isinstance(contrast, Refusal):
        return refused_arm(contrast)
    tuned = tuned_contrast(contrast, *tuning)
    flops = {name: at_equal_flops(rows, contrast, name) for name in FLOP_CONVENTIONS}
    return Arm(
        contrast=contrast,
        tuned=tuned,
        interaction=_interaction(table, contrast),
        ratio=effect_ratio(corpus, tuned),
        flops=flops,
        sign_changes=_sign_changes([contrast, *flops.values()]),
    )


def refused_arm(refusal: Refusal) -> Arm:
    """An arm of which nothing is answered."""
    flops: dict[str, Contrast | Refusal] = dict.fromkeys(FLOP_CONVENTIONS, refusal)
    return Arm(refusal, refusal, refusal, refusal, flops, False)


def _interaction(table: Table, contrast: Contrast) -> Interval | Refusal:
    """How much an architecture effect differs between the first two corpora."""
    corpora = table.levels("corpus")
    if len(corpora) < 2:
        return Refusal("R-FACTOR", "an interaction needs two corpora", "add a second corpus")
    wide = contrast.pairs.pivot(index=PLACE, columns="corpus", values="difference")
    wide = wide.reindex(columns=corpora[:2]).dropna().reset_index()
    wide = wide.assign(difference=wide[corpora[1]] - wide[corpora[0]])
    by_size = floats(means(wide, ["rung"], ["difference"]), "difference")
    first, second = (
        influence(
            where(contrast.pairs, "corpus", corpus).merge(wide[PLACE], on=PLACE),
            table.documents,
            contrast.evaluation_set,
        )
        for corpus in corpora[:2]
    )
    if first is None or second is None:
        return t_interval(by_size, "sizes")
    return t_interval(by_size, "sizes", shared_error(second.logs - first.logs))


def effect_ratio(
    corpus: Contrast | Refusal, architecture: Contrast | Refusal
) -> Interval | Refusal:
    """The corpus effect over the architecture effect, without sign, at the sizes of both.

    Where the architecture effect may be larger by an unknown amount, the ratio may be anything
    smaller, and is refused unless it is below 1 all the same.
    """
    if isinstance(corpus, Refusal):
        return corpus
    if isinstance(architecture, Refusal):
        return architecture
    both = pd.concat([corpus.by_size, architecture.by_size], axis=1, join="inner").to_numpy()
    shared = np.zeros((2, 2))
    if corpus.influence is not None and architecture.influence is not None:
        logs = (corpus.influence.logs, architecture.influence.logs)
        shared += np.array([[covariance(left, right) for right in logs] for left in logs])
    if architecture.tuning_error is not None:
        shared[1, 1] += architecture.tuning_error.error**2
    ratio = ratio_interval(both[:, 0], both[:, 1], shared if shared.any() else None)
    if isinstance(ratio, Refusal) or not architecture.open_ended:
        return ratio
    if ratio.high < 1:
        return replace(ratio, low=0.0)
    return Refusal(
        "R-TUNING",
        f"which of the two is larger rests on {architecture.other} against "
        f"{architecture.baseline}, an effect that is known from one side alone, as an arm's tuning "
        "is not bracketed",
        "train the runs that the table of tuning probes asks for",
    )


def _sign_changes(found: list[Contrast | Refusal]) -> bool:
    signs: Array = np.sign([each.effect.estimate for each in found if isinstance(each, Contrast)])
    return len(set(signs.tolist()) - {0.0}) > 1
