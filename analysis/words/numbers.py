"""Numbers as text: units, as many decimals as an interval supports, brackets."""

import math

from analysis.inference.intervals import Interval
from analysis.validity.refusal import Refusal

MOST_DECIMALS = 5
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def with_unit(value: float) -> str:
    """A count in at most three digits: 9 k, 1.8 M."""
    for scale, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"


def seeds_text(seed: int, order_seed: int) -> str:
    """The seed of a run's weights, and that of the order of its samples where it is another."""
    return str(seed) if seed == order_seed else f"{seed}, order {order_seed}"


def decimals(half_width: float) -> int:
    """Decimals that leave two significant digits of an uncertainty."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 2
    return min(max(0, 1 - math.floor(math.log10(half_width))), MOST_DECIMALS)


def number(value: float, places: int) -> str:
    """A number with fixed decimals; large ones in three digits."""
    if not math.isfinite(value):
        return "no limit"
    return f"{value:.{places}f}" if abs(value) < 1e5 else f"{value:.3g}"


def bracketed(interval: Interval | Refusal) -> str:
    """An estimate with its interval, rounded to what the interval supports."""
    if isinstance(interval, Refusal):
        return f"refused ({interval.code})"
    places = decimals_of(interval)
    ends = (interval.estimate, interval.low, interval.high)
    estimate, low, high = (number(value, places) for value in ends)
    return f"{estimate} [{low}, {high}]"


def decimals_of(interval: Interval) -> int:
    """Decimals that an interval supports; its finite side where the other has no limit."""
    low, high = interval.low, interval.high
    half = 0.5 * (high - low) if math.isfinite(high - low) else abs(interval.estimate - low)
    return decimals(half)


def capital(text: str) -> str:
    """A sentence with its first letter large."""
    return text[:1].upper() + text[1:]
