"""Data against architecture on one evaluation set: contrasts, interaction, ratio, seed noise."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.contrasts import PLACE, Contrast, contrasts
from analysis.effects.equal_compute import at_equal_flops
from analysis.effects.evaluation_error import covariance, influence, shared_error
from analysis.effects.seed_noise import Detectable, SeedNoise, detectable, seed_noise
from analysis.inference.intervals import Interval, ratio_interval, t_interval
from analysis.tables.frames import Array, floats, means, where
from analysis.tables.run_table import FLOP_CONVENTIONS, Table
from analysis.validity.refusal import Refusal


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
    noise: SeedNoise | Refusal
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
        arms=tuple(_arm(table, rows, corpus[0], each) for each in architecture),
        noise=noise,
        detectable={name: detectable(value, noise) for name, value in first.items()},
    )


def _arm(
    table: Table,
    rows: pd.DataFrame,
    corpus: Contrast | Refusal,
    contrast: Contrast | Refusal,
) -> Arm:
    if isinstance(contrast, Refusal):
        refused = dict.fromkeys(FLOP_CONVENTIONS, contrast)
        return Arm(contrast, contrast, contrast, {**refused}, False)
    flops = {name: at_equal_flops(rows, contrast, name) for name in FLOP_CONVENTIONS}
    return Arm(
        contrast=contrast,
        interaction=_interaction(table, contrast),
        ratio=effect_ratio(corpus, contrast),
        flops=flops,
        sign_changes=_sign_changes([contrast, *flops.values()]),
    )


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


def effect_ratio(corpus: Contrast | Refusal, architecture: Contrast) -> Interval | Refusal:
    """The corpus effect over the architecture effect, without sign, at the sizes of both."""
    if isinstance(corpus, Refusal):
        return corpus
    both = pd.concat([corpus.by_size, architecture.by_size], axis=1, join="inner").to_numpy()
    if corpus.influence is None or architecture.influence is None:
        return ratio_interval(both[:, 0], both[:, 1])
    logs = (corpus.influence.logs, architecture.influence.logs)
    shared = np.array([[covariance(left, right) for right in logs] for left in logs])
    return ratio_interval(both[:, 0], both[:, 1], shared)


def _sign_changes(found: list[Contrast | Refusal]) -> bool:
    signs: Array = np.sign([each.effect.estimate for each in found if isinstance(each, Contrast)])
    return len(set(signs.tolist()) - {0.0}) > 1
