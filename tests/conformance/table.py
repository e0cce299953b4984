"""Verdicts on mixers, the table of them, and how much of it may not apply.

A mixer's duties are its declared patterns times the properties that speak of each. A property that
speaks of none of its patterns is shown as not applicable, but is no duty: a mixer that only ever
sees whole sequences owes no causality, and the backbone refuses it wherever that is asked. Of the
duties at most `MOST_EXCUSED` may be excused, for a fixed length or for being approximate by design;
beyond that a mixer is not covered by this suite, and the command fails.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from launch.measurements import Measurement
from models.mixer import Pattern
from tests.conformance.case import Case
from tests.conformance.property import Property, Reason

MOST_EXCUSED = 0.15
MARKS = {Reason.PATTERN: "p", Reason.FIXED_LENGTH: "l", Reason.APPROXIMATE: "a"}
SHORT = {
    Pattern.CAUSAL_SELF: "CS",
    Pattern.CAUSAL_CROSS: "CC",
    Pattern.NONCAUSAL_SELF: "NS",
    Pattern.NONCAUSAL_CROSS: "NC",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one property of a mixer in one of its patterns.

    Attributes:
        reason: why it does not apply, if it does not.
        failure: what was found instead, if it does not hold.
    """

    kind: str
    pattern: Pattern
    name: str
    reason: Reason | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Row:
    """All verdicts on one mixer."""

    kind: str
    verdicts: tuple[Verdict, ...]

    @property
    def patterns(self) -> str:
        """The patterns it declares."""
        return " ".join(sorted({SHORT[verdict.pattern] for verdict in self.verdicts}))

    @property
    def failures(self) -> list[Verdict]:
        """What does not hold."""
        return [verdict for verdict in self.verdicts if verdict.failure is not None]

    @property
    def excused(self) -> float:
        """Share of its duties that do not apply."""
        duties = [v for v in self.verdicts if v.reason is not Reason.PATTERN]
        return sum(v.reason is not None for v in duties) / len(duties)

    @property
    def holds(self) -> bool:
        """Whether nothing fails, and enough applies."""
        return not self.failures and self.excused <= MOST_EXCUSED

    def mark(self, name: str) -> str:
        """One character for a property, over all patterns: + passed, X failed, else why not."""
        if any(verdict.name == name for verdict in self.failures):
            return "X"
        reason = self.excuse(name)
        return "+" if reason is None else MARKS[reason]

    def excuse(self, name: str) -> Reason | None:
        """Why a property applies in none of its patterns; None where it does in one."""
        reasons = {verdict.reason for verdict in self.verdicts if verdict.name == name}
        ordered = (None, Reason.APPROXIMATE, Reason.FIXED_LENGTH, Reason.PATTERN)
        return next(reason for reason in ordered if reason in reasons)


def judge(case: Case, each: Property) -> Verdict:
    """Try a property on a case."""
    try:
        reason = each.excuse(case)
        if reason is None:
            each.check(case)
    except Exception as error:  # noqa: BLE001 - whatever a mixer raises is a verdict on it
        message = str(error).strip().split("\n")[0] or "is not so"
        if not isinstance(error, AssertionError):
            message = f"{type(error).__name__}: {message}"
        return Verdict(case.kind, case.pattern, each.name, failure=message)
    return Verdict(case.kind, case.pattern, each.name, reason=reason)


def rows_of(verdicts: Iterable[Verdict]) -> list[Row]:
    """The verdicts, mixer by mixer."""
    by_kind: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_kind.setdefault(verdict.kind, []).append(verdict)
    return [Row(kind, tuple(found)) for kind, found in by_kind.items()]


def verdict_table(rows: Sequence[Row], properties: Sequence[Property]) -> Table:
    """Mixers by properties; the properties go by the numbers of `legend`."""
    table = Table(title="mixers and properties", padding=(0, 0), collapse_padding=True, box=None)
    for heading in ("mixer ", "patterns ", *map(str, range(1, len(properties) + 1)), " excused"):
        table.add_column(heading, justify="left" if heading.endswith(" ") else "right", min_width=3)
    for row in rows:
        marks = [row.mark(each.name) for each in properties]
        table.add_row(f"{row.kind} ", f"{row.patterns} ", *marks, f" {row.excused:.0%}")
    return table


def legend(properties: Sequence[Property]) -> list[str]:
    """The property of each number, and what the marks mean."""
    lines = [f"{i:3} {p.name}: {p.statement}" for i, p in enumerate(properties, 1)]
    marks = ", ".join(f"{mark} not applicable: {reason.value}" for reason, mark in MARKS.items())
    return [*lines, f"+ passed in every pattern it speaks of, X failed, {marks}"]


def measurements(rows: Sequence[Row]) -> list[Measurement]:
    """What is kept of the table: sums for each mixer, and each of its cells."""
    kept = []
    for row in rows:
        failed, excused = f"{row.kind}: failed", f"{row.kind}: share of duties excused"
        kept.append(Measurement(failed, len(row.failures), "verdicts", 0))
        kept.append(Measurement(excused, row.excused, "ratio", MOST_EXCUSED))
        for name in dict.fromkeys(verdict.name for verdict in row.verdicts):
            kept.append(_cell(row, name))
    return kept


def _cell(row: Row, name: str) -> Measurement:
    due = [v for v in row.verdicts if v.name == name and v.reason is None]
    reason = row.excuse(name)
    if reason is not None:
        return Measurement(f"{row.kind}: {name}", 0, f"not applicable: {reason.value}")
    passed = sum(verdict.failure is None for verdict in due)
    return Measurement(f"{row.kind}: {name}", passed, "patterns passed", len(due), "higher")
