"""The answer in one place: corpus against architecture by name, with all that belongs beside it."""

from dataclasses import dataclass

from analysis.effects.answer import Arm, effect_ratio
from analysis.effects.contrasts import Contrast
from analysis.effects.multipliers import Multiplier
from analysis.effects.seed_noise import Detectable
from analysis.inference.intervals import Interval
from analysis.study.study import Study
from analysis.validity.refusal import Refusal

COMPUTE = "training FLOPs"


@dataclass(frozen=True)
class Headline:
    """One corpus contrast against one architecture contrast, on the neutral set, by name.

    Attributes:
        architecture: corrected for the tuning of both arms, where the study has probes.
        ratio: of the corpus effect to the architecture effect on ln L, both without sign.
        multipliers: per factor, what its change is worth in training compute.
        detectable: per factor, the smallest difference the study finds.
    """

    evaluation_set: str
    corpus: Contrast | Refusal
    architecture: Contrast | Refusal
    ratio: Interval | Refusal
    multipliers: dict[str, Multiplier | Refusal]
    detectable: dict[str, Detectable | Refusal]


def headline(study: Study, corpus: str | None = None, architecture: str | None = None) -> Headline:
    """The named levels against the baselines; where none is named, those with the largest effects.

    Raises:
        ValueError: a name is no level of the study.
    """
    chosen_corpus = _chosen(study.answer.corpus, corpus, "corpus")
    arms = {_other(arm.contrast): arm for arm in study.answer.arms}
    # Chosen as measured: an arm whose tuning is refused must not leave its place to another.
    measured = _chosen(study.answer.architecture, architecture, "architecture")
    arm = arms.get(_other(measured))
    chosen = arm.tuned if arm else measured
    return Headline(
        evaluation_set=study.answer.evaluation_set,
        corpus=chosen_corpus,
        architecture=chosen,
        ratio=ratio_of(chosen_corpus, chosen, arm),
        multipliers={
            "corpus": _multiplier(study, chosen_corpus),
            "architecture": _tuned_multiplier(study, chosen, measured),
        },
        detectable=study.answer.detectable,
    )


def _chosen(
    results: tuple[Contrast | Refusal, ...], name: str | None, factor: str
) -> Contrast | Refusal:
    known = [each for each in results if isinstance(each, Contrast)]
    if name is not None:
        named = [each for each in known if each.other == name]
        if not named:
            others = ", ".join(each.other for each in known) or "none"
            raise ValueError(
                f"no contrast of {factor} {name!r} with the baseline; there are {others}"
            )
        return named[0]
    return max(known, key=lambda each: abs(each.effect.estimate)) if known else results[0]


def _other(contrast: Contrast | Refusal) -> str:
    return contrast.other if isinstance(contrast, Contrast) else ""


def ratio_of(
    corpus: Contrast | Refusal, architecture: Contrast | Refusal, arm: Arm | None
) -> Interval | Refusal:
    """Fieller's interval at common sizes, unless the architecture effect depends on the corpus."""
    if isinstance(corpus, Refusal):
        return corpus
    if isinstance(architecture, Refusal):
        return architecture
    crossed = arm.interaction if arm else None
    half = 0.5 * abs(architecture.effect.estimate)
    if isinstance(crossed, Interval) and crossed.excludes(0.0) and abs(crossed.estimate) > half:
        return Refusal(
            "R-INTERACTION",
            f"the effect of {architecture.other} differs between corpora by more than half of it",
            "quote it per corpus",
        )
    return effect_ratio(corpus, architecture)


def _tuned_multiplier(
    study: Study, tuned: Contrast | Refusal, measured: Contrast | Refusal
) -> Multiplier | Refusal:
    """The compute multiplier of the architectures, unless probes have moved their effect."""
    if isinstance(tuned, Contrast) and isinstance(measured, Contrast):
        moved = tuned.effect.estimate != measured.effect.estimate
        if moved or tuned.open_ended:
            return Refusal(
                "R-TUNING",
                "the laws were fitted to losses at rates and batches that the tuning probes found "
                "to be off",
                "train the study at the best rate and batch of each arm",
            )
    return _multiplier(study, tuned)


def _multiplier(study: Study, contrast: Contrast | Refusal) -> Multiplier | Refusal:
    """The compute multiplier between the two levels, the other factor at its baseline."""
    if isinstance(contrast, Refusal):
        return contrast
    pair = (contrast.baseline, contrast.other)
    refusals = [each for each in study.multipliers if isinstance(each, Refusal)]
    for each in study.multipliers:
        if isinstance(each, Refusal) or each.quantity != COMPUTE:
            continue
        sides = [side.split(" on ") for side in (each.baseline, each.other)]
        place = 0 if contrast.factor == "architecture" else 1
        if (sides[0][place], sides[1][place]) == pair and sides[0][1 - place] == sides[1][
            1 - place
        ]:
            return each
    return refusals[0] if refusals else Refusal(
        "R-REACH", f"no loss that both {pair[0]} and {pair[1]} reach", "add horizons"
    )  # fmt: skip
