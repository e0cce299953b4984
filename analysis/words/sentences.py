"""Findings as text: one sentence each."""

import math
from collections.abc import Mapping, Sequence

from analysis.effects.answer import Answer, Arm
from analysis.effects.contrasts import Contrast
from analysis.effects.multipliers import Multiplier
from analysis.effects.seed_noise import Detectable
from analysis.inference.intervals import Interval
from analysis.laws.bound import AnyLaw
from analysis.study.headline import Headline
from analysis.tables.frames import where
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal
from analysis.words.numbers import bracketed, capital, decimals_of, with_unit


def exponent_words(interval: Interval | Refusal) -> str:
    """An exponent with its interval; `not identified` where the interval includes zero."""
    if isinstance(interval, Interval) and interval.low <= 0:
        return "not identified"
    return bracketed(interval)


def law_words(law: AnyLaw) -> str:
    """A law in words, with what its cells share."""
    if not law.by:
        return f"{law.name} law"
    shared = [name for name in ("E", "alpha", "beta") if name not in law.varies]
    if not shared:
        return "set of separate Chinchilla laws"
    return f"Chinchilla law with {' and '.join(shared)} shared"


def contrast_sentence(contrast: Contrast | Refusal, detectable: Detectable | Refusal) -> str:
    """What one change does to the loss, with its interval and how sure the study can be."""
    if isinstance(contrast, Refusal):
        return f"Not answered: {contrast.reason}. To answer it, {contrast.remedy}."
    percent, change = contrast.percent, f"{contrast.other} instead of {contrast.baseline}"
    change = f"Training on {change}" if contrast.factor == "corpus" else f"Using {change}"
    places = decimals_of(percent)
    if not percent.excludes(0.0):
        low, high = f"{percent.low:+.{places}f}", f"{percent.high:+.{places}f}"
        effect = (
            f"changes loss by {percent.estimate:+.{places}f} % (95 % interval {low} to {high} %)"
        )
        return f"{change} {effect}: not distinguishable from zero in this study."
    verb = "raises" if percent.estimate > 0 else "lowers"
    size = f"{abs(percent.estimate):.{places}f}"
    ends = sorted((abs(percent.low), abs(percent.high)))
    effect = (
        f"{verb} loss by {size} % (95 % interval {ends[0]:.{places}f} to {ends[1]:.{places}f} %)"
    )
    doubt = ""
    if isinstance(detectable, Detectable) and abs(contrast.effect.estimate) < detectable.value:
        doubt = " That is below the smallest effect this study can detect: treat it with caution."
    return f"{change} {effect}.{doubt}"


def contrast_note(contrast: Contrast | Refusal) -> str:
    """How a contrast was made: nats, pairs, matching and the interval's kind."""
    if isinstance(contrast, Refusal):
        return ""
    known = "" if contrast.influence else ", with the evaluation set taken as it is"
    return (
        f"{bracketed(contrast.nats)} nats per token; {len(contrast.pairs)} pairs, "
        f"{contrast.matching}; {contrast.effect.method}{known}."
    )


def evaluation_sentence(points: Table) -> str:
    """What the losses of finished runs were measured on, and how many documents that is."""
    rows = where(points.rows, "evaluation_set", points.neutral_set)
    sizes = rows[["blocks", "documents", "targets"]].dropna().drop_duplicates()
    if len(sizes) != 1:
        return ""
    blocks, documents, targets = (float(value) for value in sizes.iloc[0])
    return (
        f"{capital(points.neutral_set)}: {with_unit(targets)} tokens of {documents:.0f} documents "
        f"({blocks:.0f} blocks), the same for every run. Intervals of effects take the documents "
        "as a sample of their domain."
    )


def short_effect(contrast: Contrast | Refusal) -> str:
    """A contrast for a figure's title."""
    if isinstance(contrast, Refusal):
        return "not answered"
    places = decimals_of(contrast.percent)
    ends = contrast.percent
    # The effect of an arm whose tuning is not bracketed has no end to one side.
    low = f"{ends.low:+.{places}f}" if math.isfinite(contrast.effect.low) else "no limit"
    high = f"{ends.high:+.{places}f}" if math.isfinite(contrast.effect.high) else "no limit"
    return f"{ends.estimate:+.{places}f} % [{low}, {high}]"


def largest_effect(contrasts: Sequence[Contrast | Refusal]) -> str:
    """The one effect of a factor, or the largest of several with its level's name."""
    known = [each for each in contrasts if isinstance(each, Contrast)]
    if not known:
        return "not answered"
    largest = max(known, key=lambda each: abs(each.effect.estimate))
    text = short_effect(largest)
    return text if len(contrasts) == 1 else f"at most {text} ({largest.other})"


def ratio_sentence(arm: Arm) -> str:
    """How the two effects compare."""
    if isinstance(arm.ratio, Refusal):
        return f"No ratio of the two is given: {arm.ratio.reason}."
    low, high = arm.ratio.low, arm.ratio.high
    verdict = "the two are of the same order"
    if low > 1:
        verdict = "the data matter more than the architecture here"
    elif high < 1:
        verdict = "the architecture matters more than the data here"
    size = f"The corpus effect is {bracketed(arm.ratio)} times the architecture effect"
    return f"{size}: {verdict}."


def headline_sentence(headline: Headline) -> str:
    """The named contrasts, their ratio, each converted to compute, and the smallest detectable."""
    corpus, architecture = headline.corpus, headline.architecture
    if isinstance(corpus, Refusal) or isinstance(architecture, Refusal):
        missing = corpus if isinstance(corpus, Refusal) else architecture
        return f"Not answered: {missing.reason}." if isinstance(missing, Refusal) else ""
    text = (
        f"On {headline.evaluation_set}, {corpus.other} instead of {corpus.baseline} changes loss "
        f"by {short_effect(corpus)}, {architecture.other} instead of {architecture.baseline} by "
        f"{short_effect(architecture)}"
    )
    if isinstance(headline.ratio, Refusal):
        text += f"; their ratio is not given, as {headline.ratio.reason}"
    else:
        text += f"; in absolute value the first is {bracketed(headline.ratio)} times the second"
    seen = [each.value for each in headline.detectable.values() if isinstance(each, Detectable)]
    text += f".{_worth_sentences(headline.multipliers)}"
    if seen:
        text += f" Effects down to {100 * math.expm1(max(seen)):.2g} % can be detected."
    return text


def _worth_sentences(multipliers: Mapping[str, Multiplier | Refusal]) -> str:
    """What each change is worth in compute; those without a number share a sentence by reason."""
    known, refused = [], {}
    for name, each in multipliers.items():
        if isinstance(each, Multiplier):
            known.append(f"{bracketed(each.factor)} times the training compute ({name})")
        else:
            refused.setdefault(each.reason, []).append(name)
    text = ""
    if known:
        text = f" For the same loss the baseline needs {' and '.join(known)}."
    for reason, names in refused.items():
        text += f" No compute multiplier is given for the {' and the '.join(names)}: {reason}."
    return text


def interaction_sentence(arm: Arm) -> str:
    """Whether one architecture effect describes all corpora."""
    first = arm.contrast
    if isinstance(arm.interaction, Refusal) or isinstance(first, Refusal):
        return ""
    percent = arm.interaction.mapped(lambda value: 100 * value)
    text = (
        f"The architecture effect differs between corpora by {bracketed(percent)} percentage points"
    )
    large = abs(arm.interaction.estimate) > 0.5 * abs(first.effect.estimate)
    if large and arm.interaction.excludes(0.0):
        return f"{text}: report it per corpus."
    return f"{text}."


def detectable_sentence(answer: Answer) -> str:
    """The smallest effect that the study detects."""
    values = [each for each in answer.detectable.values() if isinstance(each, Detectable)]
    if not values:
        return "Unknown: there is no contrast to measure it for."
    parts = [
        f"{100 * math.expm1(each.value):.2g} % for the {factor} effect"
        for factor, each in answer.detectable.items()
        if isinstance(each, Detectable)
    ]
    text = f"{capital(' and '.join(parts))} (95 % confidence, 80 % power), from {values[0].basis}."
    if isinstance(answer.noise, Refusal):
        return text
    sd = bracketed(answer.noise.sd.mapped(lambda value: 100 * value))
    return (
        f"{text} The standard deviation between seeds of {answer.noise.varied} is {sd} % of loss."
    )


def counting_sentence(arm: Arm) -> str:
    """Whether the architecture effect survives other ways of counting compute."""
    known = {name: each for name, each in arm.flops.items() if isinstance(each, Contrast)}
    if not known:
        refusal = next(iter(arm.flops.values()))
        reason = refusal.reason if isinstance(refusal, Refusal) else ""
        return f"Not answered: {reason}."
    headline = known.get("flops")
    text = (
        f"At equal training FLOPs the architecture effect is {short_effect(headline)} of loss."
        if headline
        else "At equal training FLOPs the arms have no common range."
    )
    if arm.sign_changes:
        return f"{text} Its sign depends on how FLOPs are counted: no winner should be named."
    return f"{text} Its sign is the same under every FLOP count that could be tried."


def multiplier_sentence(multiplier: Multiplier) -> str:
    """A multiplier in words."""
    value = multiplier.factor
    needs = f"{multiplier.baseline} needs {bracketed(value)} times the {multiplier.quantity}"
    where = "each at its best size"
    if multiplier.quantity == "parameters":
        where = "both with the same tokens"
    if multiplier.size is not None:
        where = f"both at {with_unit(multiplier.size)} parameters"
    return f"{needs} of {multiplier.other} to reach {multiplier.loss_nats:.3f} nats, {where}"
