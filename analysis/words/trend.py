"""Sentences on how an effect changes with size and budget."""

from analysis.effects.contrasts import Contrast
from analysis.effects.trend import trend
from analysis.inference.intervals import Interval
from analysis.words.numbers import bracketed, capital


def trend_sentence(contrast: Contrast) -> str:
    """From where to where an effect runs over the sizes, and whether it grows or shrinks."""
    found, sizes = trend(contrast), contrast.percent_by_size
    first, last = sizes.iloc[0], sizes.iloc[-1]
    text = (
        f"The {contrast.factor} effect ({contrast.other}) runs from {first['percent']:+.1f} % at "
        f"{first['rung']} to {last['percent']:+.1f} % at {last['rung']}"
    )
    if found.by_size is not None:
        text += f"; with size {_change(found.by_size, contrast, 'tenfold N')}"
    if found.by_budget is not None:
        text += f"; at a fixed size, with tokens {_change(found.by_budget, contrast, 'tenfold D')}"
    low, high = found.places["percent"].min(), found.places["percent"].max()
    return f"{capital(text)}. Over all sizes and budgets: {low:+.1f} to {high:+.1f} %."


def _change(slope: Interval, contrast: Contrast, per: str) -> str:
    points = f"{bracketed(slope)} percentage points per {per}"
    if not slope.excludes(0.0):
        return f"it neither grows nor shrinks beyond noise ({points})"
    grows = slope.estimate * contrast.effect.estimate > 0
    return f"it {'grows' if grows else 'shrinks'} ({points})"
