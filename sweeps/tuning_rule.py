"""The peak learning rate of an architecture as a function of its size, tokens and batch.

A rule is read off a search by `python -m analysis.tuning`, and stands as data in the architecture's
YAML file.
"""

import math
from dataclasses import dataclass

from trainer.field_checks import require_positive, require_within


@dataclass(frozen=True)
class Place:
    """Where a learning rate is asked for."""

    parameters: float
    """Nominal parameters of the rung."""
    tokens: float
    """Training tokens; the geometric mean of the horizons that share a trunk."""
    batch_tokens: float
    """Tokens per optimizer step."""

    def __post_init__(self) -> None:
        require_positive(self, "parameters", "tokens", "batch_tokens")


@dataclass(frozen=True)
class Exponents:
    """Powers of the learning rate in each quantity of a place, -10 to 10."""

    parameters: float
    """Power of the size."""
    tokens: float
    """Power of the tokens."""
    batch_tokens: float
    """Power of the batch; 0.5 as for a square-root rule."""

    def __post_init__(self) -> None:
        require_within(self, -10, 10, "parameters", "tokens", "batch_tokens")


@dataclass(frozen=True)
class Regret:
    """Loss at the rule's rate above the best loss, at a rung that the fit did not see."""

    rung: str
    """The rung."""
    percent: float
    """Loss above that of the rung's own best rate [%]."""
    low: float
    """Lower end of the 95 % interval [%]."""
    high: float
    """Upper end of the 95 % interval [%]."""


@dataclass(frozen=True)
class TuningRule:
    """learning_rate x (N / pivot N)^a x (tokens / pivot tokens)^b x (batch / pivot batch)^c."""

    search: str
    """Name and id of the sweep that searched."""
    learning_rate: float
    """Peak learning rate at the pivot."""
    pivot: Place
    """Centre of the search."""
    exponents: Exponents
    """Powers a, b and c."""
    log2_error: float
    """Standard error of log2 of the rate within the range of the search."""
    parameters: tuple[float, float]
    """Smallest and largest size that were searched."""
    tokens: tuple[float, float]
    """Fewest and most tokens that were searched."""
    batch_tokens: tuple[float, float]
    """Smallest and largest batch that were searched."""
    regret: Regret | None = None
    """What the rule costs at a rung that the fit did not see; null where none was left out."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate")
        require_within(self, 0, math.inf, "log2_error")
        for name in ("parameters", "tokens", "batch_tokens"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}] is no range above 0; give [low, high]")

    def at(self, place: Place) -> float:
        """The peak learning rate at a place."""
        rate = self.learning_rate
        for name in ("parameters", "tokens", "batch_tokens"):
            ratio = getattr(place, name) / getattr(self.pivot, name)
            rate *= ratio ** getattr(self.exponents, name)
        return rate

    def outside(self, place: Place, slack: float = 1.05) -> list[str]:
        """In words, each quantity of a place that lies outside the range of the search."""
        found = []
        for name, word in (("parameters", "N"), ("tokens", "tokens"), ("batch_tokens", "batch")):
            (low, high), value = getattr(self, name), getattr(place, name)
            if not low / slack <= value <= high * slack:
                found.append(f"{word} {value:.3g} (searched {low:.3g} to {high:.3g})")
        return found
