"""Every mixer with a sharded form and whole backbones, on 2, 4 and 8 ranks, against one process.

python -m tests.sequence_parallel.run               all; writes reports/sequence_parallel.json
python -m tests.sequence_parallel.run --ranks 2 4   some; writes reports/sequence_parallel_part.json

Real processes over gloo. Prints the worst relative errors of each mixer and number of ranks, then
what wrong lines in the shipped functions would have looked like. Ends with 1 if an error is above
its tolerance, or a wrong line is not seen.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launch.measurements import Measurement, write_measurements
from models.ranks.schemes import Scheme
from tests.sequence_parallel.compare import TOLERANCES, Verdict, judge_all, save_solutions
from tests.sequence_parallel.mutants import MUTANTS, Caught, mutant_problems, try_mutants
from tests.sequence_parallel.problem import DTYPES, problems, refusing_mixers
from tests.sequence_parallel.world import on_ranks

ROOT = Path(__file__).parent.parent.parent
RANKS = (2, 4, 8)


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.sequence_parallel.run")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="how many")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    begin, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 130)
    verdicts, caught = _judged(options.ranks), _tried(options.ranks)
    console.print(verdict_table(verdicts), mutant_table(caught))
    for name, reason in refusing_mixers().items():
        console.print(f"{name} refuses: {reason}", soft_wrap=True)
    wrong = [verdict for verdict in verdicts if not verdict.margin <= 1]
    for verdict in wrong:
        console.print(f"FAILED {verdict}", soft_wrap=True)
    unseen = [what for what, margin in margins(caught).items() if margin <= 1]
    for what in unseen:
        console.print(f"FAILED not seen: {what}", soft_wrap=True)
    rows = [*measurements(verdicts, caught), Measurement("time", time.monotonic() - begin, "s")]
    target = "sequence_parallel" if set(options.ranks) == set(RANKS) else "sequence_parallel_part"
    console.print(f"written to {write_measurements(target, rows, options.root)}", soft_wrap=True)
    return 1 if wrong or unseen else 0


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The worst relative errors by mixer, ranks and dtype."""
    ranks = sorted({verdict.ranks for verdict in verdicts})
    table = Table(title="worst relative error of outputs / of gradients")
    table.add_column("what", no_wrap=True)
    for dtype in DTYPES:
        for size in ranks:
            table.add_column(f"{dtype} {size} ranks", no_wrap=True)
    for name in dict.fromkeys(verdict.problem.name for verdict in verdicts):
        cells = []
        for dtype in DTYPES:
            for size in ranks:
                these = [v for v in verdicts if v.problem.name == name and v.ranks == size]
                these = [v for v in these if v.problem.dtype == dtype]
                outputs, gradients = (
                    max((getattr(v, part) for v in these), default=0.0)
                    for part in ("outputs", "gradients")
                )
                cells.append(f"{outputs:.0e} / {gradients:.0e}")
        table.add_row(name, *cells)
    return table


def mutant_table(caught: Sequence[Caught]) -> Table:
    """By how much each wrong line misses the tolerances."""
    table = Table(title="wrong lines: largest error over its tolerance, seen above 1")
    table.add_column("what", ratio=1)
    columns = [(size, dtype) for size in sorted({c.ranks for c in caught}) for dtype in DTYPES]
    for size, dtype in columns:
        table.add_column(f"{dtype} {size} ranks", no_wrap=True)
    for mutant in MUTANTS:
        seen = {c.ranks: c.margins for c in caught if c.mutant == mutant}
        cells = [f"{seen[size][dtype]:.0e}" if size in seen else "" for size, dtype in columns]
        table.add_row(mutant.what, *cells)
    return table


def margins(caught: Sequence[Caught]) -> dict[str, float]:
    """The largest float64 error over its tolerance of each wrong line, on any number of ranks."""
    largest: dict[str, float] = {}
    for each in caught:
        margin = each.margins["float64"]
        largest[each.mutant.what] = max(largest.get(each.mutant.what, 0.0), margin)
    return largest


def measurements(verdicts: Sequence[Verdict], caught: Sequence[Caught]) -> list[Measurement]:
    """The rows of the report."""
    rows = []
    for size in sorted({verdict.ranks for verdict in verdicts}):
        for dtype, (outputs, gradients) in TOLERANCES.items():
            these = [v for v in verdicts if v.ranks == size and v.problem.dtype == dtype]
            worst = max(v.outputs for v in these), max(v.gradients for v in these)
            rows.append(Measurement(f"outputs_{dtype}_{size}", worst[0], "relative", outputs))
            rows.append(Measurement(f"gradients_{dtype}_{size}", worst[1], "relative", gradients))
            rows.append(Measurement(f"problems_{dtype}_{size}", len(these), "count"))
            rows += [row for scheme in Scheme for row in _of_scheme(scheme, these)]
    found = margins(caught)
    if found:
        least = min(found.values())
        rows.append(Measurement("wrong_lines", len(found), "count", 9, "higher"))
        rows.append(Measurement("least_margin", least, "errors over tolerance", 1, "higher"))
    return rows


def _of_scheme(scheme: Scheme, verdicts: Sequence[Verdict]) -> list[Measurement]:
    """The worst errors of one way to pass states, of one dtype and number of ranks."""
    these = [v for v in verdicts if v.problem.scheme is scheme]
    if not these:
        return []
    name = f"{these[0].problem.dtype}_{these[0].ranks}_{scheme}"
    bounds = TOLERANCES[these[0].problem.dtype]
    worst = max(v.outputs for v in these), max(v.gradients for v in these)
    return [
        Measurement(f"{what}_{name}", error, "relative", bound)
        for what, error, bound in zip(("outputs", "gradients"), worst, bounds, strict=True)
    ]


def _judged(ranks: Sequence[int]) -> list[Verdict]:
    with tempfile.TemporaryDirectory() as folder:
        path, tried = Path(folder) / "solutions", problems()
        save_solutions(tried, path)
        verdicts: list[Verdict] = []
        for size in ranks:
            found = on_ranks(size, functools.partial(judge_all, tried, path))
            wrong = sum(not verdict.margin <= 1 for verdict in found)
            sys.stdout.write(f"{size} ranks: {len(found)} problems, {wrong} wrong\n")
            sys.stdout.flush()
            verdicts += found
        return verdicts


def _tried(ranks: Sequence[int]) -> list[Caught]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solutions"
        save_solutions(mutant_problems(), path)
        return [
            caught
            for size in ranks
            for caught in on_ranks(size, functools.partial(try_mutants, path))
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
