"""The title of a report: its answer as one sentence that a reader can repeat."""

import math

from analysis.effects.contrasts import Contrast
from analysis.inference.intervals import Interval
from analysis.study.headline import Headline
from analysis.validity.refusal import Refusal
from analysis.words.numbers import capital
from analysis.words.sentences import short_effect

SAME_ORDER = 2.0
"""Effects whose ratio lies within this factor either way are called about equal."""


def title_sentence(headline: Headline) -> str:
    """Which of the two changes moved the loss more, and by how much; else what is missing."""
    corpus, architecture = headline.corpus, headline.architecture
    place = f"On {headline.evaluation_set}"
    if isinstance(corpus, Refusal) and isinstance(architecture, Refusal):
        return f"Data against architecture: not answered, as {architecture.reason}"
    if isinstance(architecture, Refusal):
        return _one_answered(place, corpus, "architecture", architecture)
    if isinstance(corpus, Refusal):
        return _one_answered(place, architecture, "corpus", corpus)
    if isinstance(headline.ratio, Refusal):
        return _without_ratio(place, corpus, headline.ratio)
    return _compared(place, headline.ratio)


def numbers_line(headline: Headline) -> str:
    """The two effects behind the title, by name and with their intervals."""
    parts = [
        f"{each.factor}, {each.other} instead of {each.baseline}: {short_effect(each)}"
        for each in (headline.corpus, headline.architecture)
        if isinstance(each, Contrast)
    ]
    return capital("; ".join(parts))


def _compared(place: str, ratio: Interval) -> str:
    """The ratio is that of the corpus effect to the architecture effect."""
    larger, smaller = "corpus", "architecture"
    times = ratio
    if ratio.estimate < 1:
        larger, smaller = smaller, larger
        high = 1 / ratio.low if ratio.low > 0 else math.inf
        times = Interval(1 / ratio.estimate, 1 / ratio.high, high, ratio.method)
    if times.low > 1:
        # Without an upper end the estimate says little: only the lower end is known.
        known = math.isfinite(times.high)
        often = f"{times.estimate:.2g}" if known else f"at least {times.low:.2g}"
        return (
            f"{place}, changing the {larger} moved the loss {often} times as much as changing the "
            f"{smaller}"
        )
    if times.low > 1 / SAME_ORDER and times.high < SAME_ORDER:
        return (
            f"{place}, changing the corpus and changing the architecture moved the loss about as "
            "much"
        )
    return (
        f"{place}, this study cannot tell whether changing the corpus or changing the architecture "
        "moved the loss more"
    )


def _one_answered(place: str, known: Contrast | Refusal, missing: str, refusal: Refusal) -> str:
    assert isinstance(known, Contrast)
    return (
        f"{place}, changing the {known.factor} moved the loss {_size(known)}; what changing the "
        f"{missing} does is not answered: {_short(refusal)}"
    )


def _without_ratio(place: str, corpus: Contrast, refusal: Refusal) -> str:
    if refusal.code == "R-RATIO":
        return (
            f"{place}, changing the corpus moved the loss {_size(corpus)}, and changing the "
            "architecture by too little for this study to detect"
        )
    if refusal.code == "R-INTERACTION":
        return f"{place}, what the architecture does to the loss depends on the corpus"
    return (
        f"{place}, which of corpus and architecture moved the loss more is not answered: "
        f"{_short(refusal)}"
    )


def _size(contrast: Contrast) -> str:
    if not contrast.effect.excludes(0.0):
        return "by too little to detect"
    return f"by {abs(contrast.percent.estimate):.2g} %"


def _short(refusal: Refusal) -> str:
    """A reason short enough for a title; the page has it whole."""
    if refusal.code == "R-TUNING":
        return "an arm's learning rate or batch is not bracketed"
    return refusal.reason
