"""How time and memory of each mixer grow with the length, held against what each must keep to.

python -m tests.benchmarks.growth.bench_growth               all mixers, 1k to 64k tokens
python -m tests.benchmarks.growth.bench_growth mamba2 scout  some of them
python -m tests.benchmarks.growth.bench_growth --quick       short lengths; for tests

Points are those of tests.benchmarks.growth.growth_points, each taken twice with all others between;
the fastest time and the least memory count. A mixer's line ends with the first that takes too long
or too much. Writes reports/growth.json, .csv, .png and .svg.

A line through all lengths must keep to its mixer's bound, and fails the command if it does not.
Fixed costs flatten it, so that the line from 4,096 tokens on is held as well. There the tensors of
a pass leave the caches, and even an MLP, which mixes no tokens, grows faster than its length: by
how much it does in the same run, a mixer may exceed its bound.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.benchmarks.growth import SHORTEST, draw, exponents
from analysis.tables.frames import floats, groups, keep
from kernels.dispatch import warm
from launch.measurements import Measurement, write_measurements
from models.mixer import Mixer, mixer_kinds
from tests.benchmarks.growth.growth_points import CONTROL, FIELDS, Point, build, take

ROOT = Path(__file__).parents[3]
LINEAR, CONVOLUTION = 1.1, 1.2
CONVOLUTIONS = ("monarch", "s4d")
COUNTED = {"attention": 0.0, "scout": 0.1, "hip": 0.1}
"""Mixers bounded by the growth of what they count as their work, and by how much more."""
SHORT, LONG = 1024, 65_536
QUICK_LENGTHS = (128, 256)
LATE = f" from {SHORTEST:,} on"
ROUNDS = 2
"""What slows the machine down for a while should not reach a point in each."""


def bound(kind: str, lengths: Sequence[int]) -> float:
    """The exponent of time that a mixer must keep to, over these lengths."""
    if kind not in COUNTED:
        return CONVOLUTION if kind in CONVOLUTIONS else LINEAR
    if kind == "attention":
        return 2.0
    mixer = build(kind)
    assert isinstance(mixer, Mixer)
    dense = sum(p.numel() for p in mixer.parameters())
    work = [2 * dense * n + mixer.mix_flops(n, n).needed for n in lengths]
    rows = pd.DataFrame({"mixer": kind, "length": lengths, "seconds": work, "bytes": work})
    return float(exponents(rows, 0)["seconds"].iloc[0]) + COUNTED[kind]


def excess(rows: Sequence[Mapping[Hashable, Any]]) -> float:
    """By how much more than its length the time of what mixes no tokens grows."""
    grown = [float(row["seconds"]) - 1.0 for row in rows if row["mixer"] == CONTROL]
    return max([0.0, *grown])


def measure(kinds: Sequence[str], lengths: Sequence[int], target: str, root: Path) -> bool:
    """Measure, write the report and show it; tells whether every bound was kept."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    begin, load = time.monotonic(), os.getloadavg()[0]
    warm()
    rows, ends = _take_all(kinds, lengths, console)
    points = pd.DataFrame(rows)
    (root / "reports").mkdir(parents=True, exist_ok=True)
    draw(points, target).save(root / "reports")
    measured = [*_exponent_rows(points), *_point_rows(points), *_end_rows(ends)]
    measured.append(Measurement("load average at the start", load, ""))
    measured.append(Measurement("benchmark", time.monotonic() - begin, "s"))
    path = write_measurements(target, measured, root)
    console.print(_table(points, {row.name: row for row in measured}))
    console.print(f"{path}, with .csv, .png and .svg beside it", highlight=False)
    return all(row.holds is not False for row in measured)


def _take_all(
    kinds: Sequence[str], lengths: Sequence[int], console: Console
) -> tuple[list[dict[str, object]], dict[str, tuple[int, str]]]:
    """Each point at its best, and where the lines of mixers ended."""
    points = [Point(kind, length) for kind in kinds for length in lengths]
    best: dict[Point, tuple[float, int]] = {}
    ends: dict[str, tuple[int, str]] = {}

    def is_on_its_line(point: Point) -> bool:
        return point.mixer not in ends or point.length < ends[point.mixer][0]

    for round_ in range(ROUNDS):
        for point in filter(is_on_its_line, points):
            answer = take(point)
            line = f"round {round_ + 1} of {ROUNDS}: {point.mixer} {point.length}: {answer}"
            console.print(line, highlight=False)
            if isinstance(answer, str):
                ends[point.mixer] = (point.length, answer)
                continue
            seconds, size = best.get(point, answer)
            best[point] = min(answer[0], seconds), min(answer[1], size)
    rows: list[dict[str, object]] = [
        {"mixer": point.mixer, "length": point.length, "seconds": seconds, "bytes": size}
        for point, (seconds, size) in best.items()
        if is_on_its_line(point)
    ]
    return rows, ends


def _exponent_rows(points: pd.DataFrame) -> Iterator[Measurement]:
    """Exponents over all lengths, and from some length on, and how well they are known."""
    for ending, shortest in (("", 0), (LATE, SHORTEST)):
        found = exponents(points, shortest).to_dict("records")
        of_caches = excess(found) if ending else 0.0
        for row in found:
            kind = row["mixer"]
            seen = keep(points, (points["mixer"] == kind) & (points["length"] >= shortest))
            limits: dict[str, float | None] = {"time": None, "memory": LINEAR if ending else None}
            if kind != CONTROL:
                limits["time"] = bound(kind, seen["length"].tolist()) + of_caches
            for column, label in (("seconds", "time"), ("bytes", "memory")):
                name = f"{kind}: exponent of {label}{ending}"
                yield Measurement(name, row[column], "", limits[label])
                if not math.isnan(row[f"{column}_error"]):
                    yield Measurement(f"{name}, standard error", row[f"{column}_error"], "")


def _point_rows(points: pd.DataFrame) -> Iterator[Measurement]:
    for row in points.to_dict("records"):
        name = f"{row['mixer']} at {row['length']} tokens"
        yield Measurement(f"{name}: time", row["seconds"], "s")
        yield Measurement(f"{name}: memory", row["bytes"], "bytes")


def _end_rows(ends: Mapping[str, tuple[int, str]]) -> Iterator[Measurement]:
    for kind, (length, reason) in ends.items():
        yield Measurement(f"{kind}: not measured from here on: {reason}", length, "tokens")


def _table(points: pd.DataFrame, measured: Mapping[str, Measurement]) -> Table:
    table = Table(title="exponents; standard errors of the line's fit")
    table.add_column("mixer")
    late = (f"time{LATE}", "bound", f"memory{LATE}", "bound")
    for heading in ("up to", "time", "bound", *late, "kept"):
        table.add_column(heading, justify="right")
    for (kind,), line in groups(points, ["mixer"]):
        names = [f"{kind}: exponent of {of}" for of in ("time", f"time{LATE}", f"memory{LATE}")]
        cells = [cell for name in names for cell in _cells(measured, name)]
        missed = any(name in measured and measured[name].holds is False for name in names)
        longest = f"{int(floats(line, 'length')[-1]):,}"
        kept = "NO" if missed else "yes"
        table.add_row(str(kind), longest, *cells, kept)
    return table


def _cells(measured: Mapping[str, Measurement], name: str) -> tuple[str, str]:
    """An exponent with its error, and its bound; nothing where there is none."""
    row, error = measured.get(name), measured.get(f"{name}, standard error")
    if row is None:
        return "", ""
    spread = "" if error is None else f" +- {error.value:.2f}"
    return f"{row.value:.2f}{spread}", "" if row.bound is None else f"{row.bound:.2f}"


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth.bench_growth")
    others = ", ".join(kind for kind in FIELDS if kind != CONTROL)
    parser.add_argument("mixers", nargs="*", help=f"of {others}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    parser.add_argument("--longest", type=int, default=LONG, help="last length, in tokens")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    mixer_kinds()
    unknown = sorted(set(options.mixers) - set(FIELDS))
    if unknown:
        parser.error(f"unknown mixers {', '.join(unknown)}; choose from {others}")
    kinds = list(dict.fromkeys([CONTROL, *(options.mixers or FIELDS)]))
    if options.quick:
        return 0 if measure(kinds, QUICK_LENGTHS, "growth_quick", options.root) else 1
    lengths = [SHORT << i for i in range(32) if SHORT << i <= options.longest]
    return 0 if measure(kinds, lengths, "growth", options.root) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
