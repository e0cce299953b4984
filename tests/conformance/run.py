"""Every mixer that can be found, held to every property: `make conformance`.

python -m tests.conformance.run                     all; writes reports/conformance.json
python -m tests.conformance.run --kinds mamba       some; writes reports/conformance_part.json

Prints a table of mixers and properties. Ends with 1 if a property does not hold, or if too much of
a mixer is excused.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from launch.measurements import Measurement, write_measurements
from tests.conformance.case import case_of, declared_cases
from tests.conformance.property import Reason
from tests.conformance.suite import PROPERTIES
from tests.conformance.table import (
    MOST_EXCUSED,
    Row,
    Verdict,
    judge,
    legend,
    measurements,
    rows_of,
    verdict_table,
)

ROOT = Path(__file__).parent.parent.parent


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.run", description=__doc__)
    parser.add_argument("--kinds", nargs="+", help="mixers to try; all if not given")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    known = {kind for kind, _ in declared_cases()}
    unknown = sorted(set(options.kinds or ()) - known)
    if unknown:
        parser.error(f"unknown mixers {unknown}; known are {', '.join(sorted(known))}")
    # Small products gain nothing from threads, and lose to whatever else the machine does.
    torch.set_num_threads(1)
    begin = time.monotonic()
    rows = rows_of(_judged(set(options.kinds or known)))
    seconds = Measurement("conformance", time.monotonic() - begin, "s")
    (options.root / "reports").mkdir(parents=True, exist_ok=True)
    target = "conformance" if options.kinds is None else "conformance_part"
    path = write_measurements(target, [*measurements(rows), seconds], options.root)
    return _show(rows, path)


def _judged(kinds: set[str]) -> Iterator[Verdict]:
    for kind, pattern in declared_cases():
        if kind in kinds:
            begin, case = time.monotonic(), case_of(kind, pattern)
            verdicts = [judge(case, each) for each in PROPERTIES]
            failed = sum(verdict.failure is not None for verdict in verdicts)
            took = time.monotonic() - begin
            sys.stdout.write(f"{kind} {pattern.value}: {failed} failed, {took:.1f} s\n")
            sys.stdout.flush()
            yield from verdicts


def _show(rows: list[Row], path: Path) -> int:
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(verdict_table(rows, PROPERTIES))
    for line in legend(PROPERTIES):
        console.print(line, soft_wrap=True)
    for row in rows:
        for found in row.failures:
            where = f"{found.kind} {found.pattern.value} {found.name}"
            console.print(f"FAILED {where}: {found.failure}", soft_wrap=True, markup=False)
        if row.excused > MOST_EXCUSED:
            what = f"{row.excused:.0%} of its duties are excused, {MOST_EXCUSED:.0%} may be"
            console.print(f"FAILED {row.kind}: {what}")
    due = [found for row in rows for found in row.verdicts if found.reason is not Reason.PATTERN]
    failed = sum(found.failure is not None for found in due)
    excused = sum(found.reason is not None for found in due)
    console.print(
        f"{len(rows)} mixers, {len({(v.kind, v.pattern) for v in due})} with their patterns: "
        f"{len(due) - failed - excused} passed, {failed} failed, {excused} excused"
    )
    console.print(f"written to {path}", soft_wrap=True)
    good = all(row.holds for row in rows)
    console.print("all in order" if good else "not in order")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
