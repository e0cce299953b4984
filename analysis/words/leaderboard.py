"""Tables and sentences for the leaderboard of arms at one size and horizon."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.effects.leaderboard import BEATS, CONTEXTS, IDENTITY, Comparison, verdict
from analysis.inference.intervals import Interval
from analysis.words.numbers import bracketed, with_unit


def arms_shown(comparisons: tuple[Comparison, ...]) -> pd.DataFrame:
    """The table as a reader sees it: digits that the intervals support, units in the head."""
    records = []
    for comparison in comparisons:
        for arm in comparison.arms:
            differences = {
                f"minus {name}": _difference(arm.against[name])
                for name in comparison.lines
                if name in arm.against
            }
            records.append(
                {
                    "corpus": comparison.place.corpus,
                    "rung": comparison.place.rung,
                    "architecture": arm.architecture,
                    "seeds": str(len(arm.seeds)),
                    "parameters": with_unit(arm.parameters),
                    "loss [nats per token]": _loss(arm.loss),
                    **differences,
                    "training FLOPs a token": with_unit(arm.training_flops_per_token),
                    "measured tokens/s": _count(arm.tokens_per_second),
                    **{
                        f"state at {label} [bytes]": _count(arm.state_bytes.get(context, np.nan))
                        for context, label in CONTEXTS.items()
                    },
                }
            )
    shown = pd.DataFrame(records)
    if len({each.place.corpus for each in comparisons}) < 2:
        shown = shown.drop(columns="corpus", errors="ignore")
    return shown


def caption(comparison: Comparison) -> str:
    """How the intervals of one place were made, and what they suppose."""
    place = comparison.place
    runs = sum(len(arm.seeds) for arm in comparison.arms)
    text = f"n = {runs} seeds of {len(comparison.arms)} arms after {with_unit(place.tokens)} tokens"
    if comparison.freedom:
        text += (
            f"; intervals: 95 %, from the standard deviation between seeds pooled over the arms, "
            f"{comparison.pooled_sd:.2g} nats, and Student's t with {comparison.freedom} pooled "
            "degrees of freedom. They assume the same seed variance in every arm and independent "
            "seeds, without correction for multiple comparisons."
        )
    else:
        text += (
            "; one seed per arm, so there is no interval and no verdict: differences may be noise."
        )
    counted = {tokens for tokens in comparison.line_tokens.values() if tokens != place.tokens}
    if counted:
        text += (
            f" N-gram models were counted on {', '.join(map(with_unit, sorted(counted)))} tokens."
        )
    return " ".join([text, *comparison.notes])


def arm_lines(comparisons: tuple[Comparison, ...]) -> list[str]:
    """The arms for a terminal: per setting the best one, and which do not beat the baselines."""
    lines = []
    for comparison in comparisons:
        place, best = comparison.place, comparison.arms[0]
        lines.append(
            f"{place.rung} on {place.corpus}: lowest loss {best.architecture}, "
            f"{_loss(best.loss)} nats per token, of {len(comparison.arms)} arms"
            + ("." if comparison.freedom else ", one seed each: no interval, no verdict.")
        )
        lines += _line_words(comparison)
    return lines


def _line_words(comparison: Comparison) -> Iterator[str]:
    others = [arm for arm in comparison.arms if arm.architecture != IDENTITY]
    for name, loss in comparison.lines.items():
        judged = {arm.architecture: verdict(arm.against[name]) for arm in others}
        if not any(judged.values()):
            above = [arm.architecture for arm in others if arm.against[name].estimate >= 0]
            yield f"  {name} ({loss:.3f}): {', '.join(above) or 'no arm'} above it."
            continue
        losers = [arm for arm, words in judged.items() if words != BEATS]
        beaten_by = f"by all but {', '.join(losers)}" if losers else f"by all {len(others)} arms"
        if len(losers) == len(others):
            beaten_by = f"by none of {len(others)} arms"
        yield f"  {name} ({loss:.3f}) beaten by more than the seed noise: {beaten_by}."


def _loss(interval: Interval) -> str:
    return bracketed(interval) if np.isfinite(interval.low) else f"{interval.estimate:.4f}"


def _difference(interval: Interval) -> str:
    if not np.isfinite(interval.low):
        return f"{interval.estimate:+.4f}"
    return f"{bracketed(interval)} {verdict(interval)}"


def _count(value: float) -> str:
    return with_unit(value) if np.isfinite(value) else ""
