"""Share of the GEMM peak that each architecture trains at on this CPU, and kernels over floors.

python -m tests.benchmarks.training.bench_architectures
    d_model 512, 1,024 tokens
python -m tests.benchmarks.training.bench_architectures mamba2 --rounds 3
    one group; see GROUPS for their names
python -m tests.benchmarks.training.bench_architectures --quick
    one round at a tiny size

A step is forward, loss, backward and AdamW. Contenders of a group take turns, in the opposite order
every other round. A turn is two steps, of which the second counts: the first finds the caches full
of another contender's numbers, as no step of a run but its first does. The peak, that of a square
product in float32, is measured before the first turn, between all and after the last: a share is
model FLOPs by the seconds of a step by the mean of the two peaks around its turn. Model FLOPs are
those of products, as the accountant counts them, without recomputation or the pointwise work of
scans. A goal that is missed is no failure of the command.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from launch.measurements import Measurement, write_measurements
from models.accounting import account
from sweeps.rungs import Rung
from tests.benchmarks.kernels import bench_selective_scan, bench_ssd
from tests.benchmarks.kernels.parallel_scan import parallel_selective_scan
from tests.benchmarks.kernels.timing import interleave
from tests.benchmarks.training.bench import ROOT, gemm_flops
from tests.benchmarks.training.bench_models import THREADS, Built, Size, Task, bare, compiled
from tests.benchmarks.training.bench_peers import (
    llama,
    plain,
    plain_compiled,
    their_mamba,
    their_mamba2,
)
from tests.benchmarks.training.bench_processes import Child, prepare_threads, serve_made
from tests.benchmarks.training.bench_rows import row_table, spread_rows

BUILD_SECONDS = 300.0
STEP_SECONDS = 120.0
"""A first step, which may compile, or a later one that takes longer is stopped for good."""
CONTENDER_SECONDS = 60.0
"""A contender whose steps have taken so long sits out the other rounds."""

# Goals, written down before anything was measured.
SHARE_GOALS = {
    "transformer ours": 0.75,
    "transformer ours compiled": 0.85,
    "mamba2 ours": 0.55,
    "hybrid ours": 0.55,
    "mamba ours": 0.45,
    "m2 ours": 0.45,
    "scout_mamba ours": 0.45,
    "scout_window ours": 0.45,
}
SCAN_GOALS = {"forward": 1.0, "both": 3.0}
SSD_GOAL = 2.0

Makers = dict[str, Callable[[Task], Built]]
GROUPS: dict[str, Makers] = {
    "transformer": {
        "ours": bare,
        "ours compiled": compiled,
        "plain block": plain,
        "plain block compiled": plain_compiled,
        "Llama of transformers": llama,
    },
    "mamba2": {"ours": bare, "transformers": their_mamba2},
    "hybrid": {"ours": bare, "ours compiled": compiled},
    "mamba": {"ours": bare, "ours compiled": compiled, "transformers": their_mamba},
    "m2": {"ours": bare},
    "scout_mamba": {"ours": bare},
    "scout_window": {"ours": bare},
}
"""What takes turns, by architecture."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: steps of each contender after its first.
        gemm_side: of the square product that the peak is taken from.
        kernels: names of sizes in the benchmarks of the selective scan and of SSD.
        goals: whether the goals, which are of the full size, are held against.
    """

    target: str
    size: Size
    rounds: int
    gemm_side: int
    kernels: tuple[str, str]
    goals: bool


FULL = Plan(
    "bench_architectures", Size(Rung("d512", 512, 8, 8), 1024, 2), 5, 2048, ("large", "goal"), True
)
QUICK = Plan(
    "bench_architectures_quick",
    Size(Rung("d24", 24, 2, 2, 19_540), 32, 4),
    1,
    256,
    ("tiny", "tiny"),
    False,
)


@dataclass
class Turns:
    """What one contender did.

    Attributes:
        setting: how it ran, where there was a choice.
        cold: seconds of its first step, which compiles what is compiled.
        seconds: of the second step of each later turn, by round.
        shares: of the peak around each of them.
        stopped: whether a step took too long.
    """

    setting: str = ""
    cold: float = math.nan
    seconds: dict[int, float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    stopped: bool = False

    def sits_out(self) -> bool:
        """Whether it has no more turns."""
        taken = 2 * sum(self.seconds.values()) + (0.0 if math.isnan(self.cold) else self.cold)
        return self.stopped or taken > CONTENDER_SECONDS


class Group:
    """The contenders of one architecture, each in a process of its own."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.name, self._plan = name, plan
        self._task = Task(plan.size.shape(name), plan.size)
        counted = account(self._task.model, plan.size.seq_len)
        self._flops = counted.training_flops_per_token * plan.size.tokens
        self.turns = {maker: Turns() for maker in GROUPS[name]}
        self.peaks: list[float] = []

    def run(self) -> None:
        """Build everyone, let everyone take a first step, then take turns."""
        children = {each: Child(serve_made, make) for each, make in GROUPS[self.name].items()}
        for maker, child in children.items():
            child.ask(self._task)
            built = child.answer(BUILD_SECONDS)
            self.turns[maker].stopped = built is None
            self.turns[maker].setting = "" if built is None else built[1]
        order = list(children)
        self._measure_peak()
        for round_ in range(self._plan.rounds + 1):
            for maker in order:
                if not self.turns[maker].sits_out():
                    self._take_turn(children[maker], self.turns[maker], round_)
            order.reverse()
        for child in children.values():
            child.stop()

    def _take_turn(self, child: Child, turns: Turns, round_: int) -> None:
        steps = 1 if round_ == 0 else 2
        for _ in range(steps):
            child.ask("step")
            answer = child.answer(STEP_SECONDS)
            if answer is None:
                turns.stopped = True
                return
        before = self.peaks[-1]
        self._measure_peak()
        seconds, loss = answer
        assert math.isfinite(loss), f"a loss of {loss} is no training step"
        if round_ == 0:
            turns.cold = seconds
            return
        turns.seconds[round_] = seconds
        turns.shares.append(self._flops / seconds / statistics.mean((before, self.peaks[-1])))

    def _measure_peak(self) -> None:
        self.peaks.append(gemm_flops(self._plan.gemm_side))

    def rows(self) -> Iterator[Measurement]:
        """The group's figures."""
        for maker, turns in self.turns.items():
            name = f"{self.name} {maker}"
            yield Measurement(f"{name}: first step", turns.cold, "s")
            if not turns.shares:
                label = f"{name}: stopped or too slow for more than a first step"
                yield Measurement(label, 1.0, "")
                continue
            speeds = [self._plan.size.tokens / s for s in turns.seconds.values()]
            yield from spread_rows(f"{name}: speed", speeds, "tokens/s", higher=True)
            goal = SHARE_GOALS.get(name) if self._plan.goals else None
            label = f"{name}: share of GEMM peak"
            yield from spread_rows(label, turns.shares, "", goal, higher=True)
        yield from self._ratio_rows()

    def _ratio_rows(self) -> Iterator[Measurement]:
        ours = self.turns["ours"].seconds
        for maker, turns in self.turns.items():
            common = sorted(ours.keys() & turns.seconds.keys())
            if maker == "ours" or not common:
                continue
            ratios = [ours[r] / turns.seconds[r] for r in common]
            label = f"{self.name}: speed of {maker} over ours"
            yield from spread_rows(label, ratios, "ratio", higher=True)


def kernel_rows(scan: str, ssd: str) -> Iterator[Measurement]:
    """Scans against what they cannot do without, and against plain torch's parallel scan."""
    yield from _scan_rows(bench_selective_scan.SIZES[scan])
    times = interleave(bench_ssd.make_contenders(bench_ssd.SIZES[ssd]))
    for name, floor in (("forward", "products"), ("both", "all products")):
        label = f"SSD {name}: time over its products"
        yield from spread_rows(label, _ratios(times[name], times[floor]), "ratio", SSD_GOAL)


def _scan_rows(size: tuple[int, int, int, int]) -> Iterator[Measurement]:
    ours = bench_selective_scan.make_contenders(size)
    times = interleave(ours)
    for name, goal in SCAN_GOALS.items():
        label = f"selective scan {name}: time over torch.exp of all its states"
        yield from spread_rows(label, _ratios(times[name], times["exp"]), "ratio", goal)
    theirs = bench_selective_scan.make_contenders(size, parallel_selective_scan)
    pairs = {"ours": ours["forward"], "theirs": theirs["forward"]}
    pairs |= {"ours both": ours["both"], "theirs both": theirs["both"]}
    times = interleave(pairs, rounds=5)
    for name in ("", " both"):
        label = f"selective scan{name or ' forward'}: parallel scan in plain torch over ours"
        yield from spread_rows(
            label, _ratios(times[f"theirs{name}"], times[f"ours{name}"]), "ratio"
        )


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [x / y for x, y in zip(above, below, strict=True)]


def measure(plan: Plan, names: list[str], root: Path, console: Console) -> None:
    """Measure, write the report and show it."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    prepare_threads()
    rows, peaks = list(kernel_rows(*plan.kernels)), []
    if not plan.goals:
        rows = [replace(row, bound=None) for row in rows]
    for name in names:
        group = Group(name, plan)
        group.run()
        new = list(group.rows())
        rows, peaks = [*rows, *new], [*peaks, *group.peaks]
        console.print(row_table(new))
    for word, value in (("median", statistics.median(peaks)), ("highest", max(peaks))):
        rows.append(Measurement(f"GEMM peak, {word}", value / 1e9, "GFLOP/s"))
    apart = (max(peaks) - min(peaks)) / statistics.median(peaks)
    rows.append(Measurement("GEMM peak, range over median", apart, "ratio"))
    rows.append(Measurement("load average at the start", load, ""))
    rows.append(Measurement("benchmark", time.monotonic() - begin, "s"))
    path = write_measurements(plan.target, rows, root)
    console.print(row_table(rows))
    console.print(f"{THREADS} threads, flush-to-zero on, torch {torch.__version__}; {path}")


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training.bench_architectures")
    parser.add_argument("names", nargs="*", choices=[[], *GROUPS], help="architectures; all")
    parser.add_argument("--quick", action="store_true", help="one round at a tiny size")
    parser.add_argument("--rounds", type=int, help="steps of each contender after its first")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    plan = QUICK if options.quick else FULL
    if options.rounds:
        plan = replace(plan, rounds=options.rounds)
    console = Console(width=None if sys.stdout.isatty() else 130)
    measure(plan, options.names or list(GROUPS), options.root, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
