"""What a property is: one function, and when it applies."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from models.mixer import Pattern
from tests.conformance.case import Case


class Reason(Enum):
    """Why a property does not apply to a mixer; there are no others."""

    PATTERN = "pattern"
    FIXED_LENGTH = "fixed length"
    APPROXIMATE = "approximate by design"


@dataclass(frozen=True)
class Property:
    """Something that holds for every mixer, or a stated reason why not.

    Attributes:
        check: raises AssertionError where it does not hold.
        patterns: the patterns that it speaks of.
        fixed_length: whether it needs documents longer than a mixer with a `max_len` can mix.
        exact: whether it asks more than a mixer that is approximate by design can give.
    """

    check: Callable[[Case], None]
    patterns: frozenset[Pattern]
    fixed_length: bool = False
    exact: bool = False

    @property
    def name(self) -> str:
        """Its function's name."""
        return self.check.__name__

    @property
    def statement(self) -> str:
        """The sentence that its function's docstring begins with."""
        return (inspect.getdoc(self.check) or "").split("\n")[0]

    def excuse(self, case: Case) -> Reason | None:
        """Why it does not apply to a case; None where it does."""
        if case.pattern not in self.patterns:
            return Reason.PATTERN
        if self.fixed_length and case.max_len is not None:
            return Reason.FIXED_LENGTH
        if self.exact and case.mixer.approximate:
            return Reason.APPROXIMATE
        return None


def states(
    patterns: frozenset[Pattern], *, fixed_length: bool = False, exact: bool = False
) -> Callable[[Callable[[Case], None]], Property]:
    """Make a property of a check."""
    return functools.partial(Property, patterns=patterns, fixed_length=fixed_length, exact=exact)
