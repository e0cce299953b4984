"""Speed of a training step, against transformers' models of the same shape in the same run.

python -m tests.benchmarks.training.bench
    about five minutes; writes reports/bench.json
python -m tests.benchmarks.training.bench --quick
    one round at tiny sizes; writes reports/bench_quick.json

Contenders take turns, in the opposite order every other round, so that a busy machine slows all of
them alike; ratios are taken within a round. A goal that is missed is no failure of the command.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from launch.measurements import Measurement, write_measurements
from sweeps.rungs import Rung
from tests.benchmarks.kernels import bench_selective_scan
from tests.benchmarks.kernels.timing import interleave
from tests.benchmarks.training.bench_models import THREADS, Size, Task
from tests.benchmarks.training.bench_processes import (
    CONTENDERS,
    Child,
    prepare_threads,
    serve,
    serve_costs,
)
from tests.benchmarks.training.bench_rows import (
    START_UP_BOUND,
    STEP_SECONDS,
    Timing,
    Timings,
    peak_rows,
    ratio_rows,
    row_table,
    speed_rows,
    speed_table,
    spread_rows,
    unrest,
)

ROOT = Path(__file__).parents[3]
BUILD_SECONDS = 300.0
CONTENDER_SECONDS = 75.0
"""A contender whose next step would lead beyond this, at one size, sits out the other rounds."""
NOISY = 0.15


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: with the rounds at each, after one for warming up.
        repeats: start-ups and saves.
        gemm_side: of the square product that the peak is taken from.
        scan: name of a size in the scan's benchmark.
    """

    target: str
    sizes: tuple[tuple[Size, int], ...]
    repeats: int
    gemm_side: int
    scan: str


# Rungs whose parameters the ladder can give both architectures within 1 %.
SMALL = Size(Rung("d128", 128, 4, 4, 812_500), seq_len=256, batch=32)
LARGE = Size(Rung("d512", 512, 8, 8), seq_len=1024, batch=2)
TINY = Size(Rung("d24", 24, 2, 2, 19_540), seq_len=32, batch=4)
LITTLE = Size(Rung("d48", 48, 2, 2, 68_180), seq_len=64, batch=2)
FULL = Plan("bench", ((SMALL, 9), (LARGE, 5)), repeats=5, gemm_side=2048, scan="large")
QUICK = Plan("bench_quick", ((TINY, 1), (LITTLE, 1)), repeats=2, gemm_side=256, scan="tiny")


class ModelBench:
    """All contenders at all sizes, and the machine's peak between their rounds."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.timings: dict[Size, Timings] = {}
        self.peaks: list[float] = []
        self._plan, self._say = plan, say

    def run(self) -> None:
        """Measure."""
        children = {contender: Child(serve, contender) for contender in CONTENDERS}
        for size, rounds in self._plan.sizes:
            self._build(children, size)
            self._take_rounds(children, size, rounds)
        for child in children.values():
            child.stop()

    def _build(self, children: dict[tuple[str, str], Child], size: Size) -> None:
        timings = self.timings.setdefault(size, {})
        for contender, child in children.items():
            child.ask(Task(size.shape(contender[0]), size))
        for contender, child in children.items():
            built = child.answer(BUILD_SECONDS)
            if built is None:
                raise RuntimeError(
                    f"{contender} at {size.rung.name} was not built in {BUILD_SECONDS:.0f} s; "
                    "run the benchmark on a machine with less to do"
                )
            timings[contender] = Timing(*built)

    def _take_rounds(self, children: dict[tuple[str, str], Child], size: Size, rounds: int) -> None:
        timings, order = self.timings[size], list(CONTENDERS)
        self.peaks.append(gemm_flops(self._plan.gemm_side))
        for round_ in range(rounds + 1):
            for contender in order:
                if not sits_out(timings[contender]):
                    _take_turn(children[contender], timings[contender], round_)
            order.reverse()
            self.peaks.append(gemm_flops(self._plan.gemm_side))
            took = ", ".join(_turn(name, each, round_) for name, each in timings.items())
            peak = f"peak {self.peaks[-1] / 1e9:.0f} GFLOP/s"
            self._say(f"{size.rung.name} round {round_} of {rounds}: {peak}; seconds: {took}")


def sits_out(timing: Timing) -> bool:
    """Whether a contender has no more turns at its size."""
    taken = [*([timing.cold] if timing.cold else []), *timing.rounds.values()]
    return timing.stopped or (bool(taken) and sum(taken) + taken[-1] > CONTENDER_SECONDS)


def _take_turn(child: Child, timing: Timing, round_: int) -> None:
    child.ask("step")
    answer = child.answer(STEP_SECONDS)
    if answer is None:
        timing.stopped = True
        return
    seconds, loss = answer
    assert math.isfinite(loss), f"a loss of {loss} is no training step"
    if round_ == 0:
        timing.cold = seconds
    else:
        timing.rounds[round_] = seconds


def _turn(contender: tuple[str, str], timing: Timing, round_: int) -> str:
    seconds = timing.rounds.get(round_) if round_ else timing.cold
    return f"{' '.join(contender)} {'-' if seconds is None else f'{seconds:.2f}'}"


def gemm_flops(side: int) -> float:
    """FLOP/s of the best of a few square products in float32."""
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    b, out = a.t().contiguous(), torch.empty_like(a)
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * side**3 / best


def scan_rows(size: str) -> Iterator[Measurement]:
    """The native scan against torch.exp over as many elements, as its own benchmark does."""
    contenders = bench_selective_scan.make_contenders(bench_selective_scan.SIZES[size])
    times = interleave(contenders)
    for name, label in (("forward", "forward"), ("both", "forward and backward")):
        ratios = [x / y for x, y in zip(times[name], times["exp"], strict=True)]
        yield from spread_rows(f"selective scan {label}: time over torch.exp", ratios, "ratio")
        yield from spread_rows(f"selective scan {label}: time", times[name], "ms")


def cost_rows(repeats: int, folder: Path) -> Iterator[Measurement]:
    """The start of a run, and a checkpoint."""
    child = Child(serve_costs, repeats, folder)
    measured = child.answer(BUILD_SECONDS)
    child.stop()
    if measured is None:
        raise RuntimeError(
            f"start-ups and saves took over {BUILD_SECONDS:.0f} s; run the benchmark on a machine "
            "with less to do"
        )
    (first, *later), saves = measured
    yield Measurement("start-up, first run of a process", first, "s")
    yield from spread_rows("start-up, later runs of a process", later, "s", START_UP_BOUND)
    yield from spread_rows("checkpoint save", saves, "s")


def measure(plan: Plan, root: Path, console: Console) -> None:
    """Measure everything, write the report and show it."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    reports = root / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    prepare_threads()
    costs = list(cost_rows(plan.repeats, reports))
    scan = list(scan_rows(plan.scan))
    bench = ModelBench(plan, lambda line: console.print(line, highlight=False, soft_wrap=True))
    bench.run()
    peak = statistics.median(bench.peaks)
    speeds, rows = [], [*peak_rows(bench.peaks), Measurement("load average at the start", load, "")]
    for size, timings in bench.timings.items():
        speeds += speed_rows(size, timings, peak)
        rows += ratio_rows(size, timings)
    rows += [*scan, *costs, Measurement("benchmark", time.monotonic() - begin, "s")]
    path = write_measurements(plan.target, [*speeds, *rows], root)
    promised = [row for row in speeds if row.bound is not None]
    console.print(speed_table(bench.timings, peak), row_table([*promised, *rows]))
    for line in _remarks(bench, load):
        console.print(line, highlight=False)
    console.print(f"written to {path}", highlight=False)


def _remarks(bench: ModelBench, load: float) -> Iterator[str]:
    yield f"{THREADS} threads each, flush-to-zero on, torch {torch.__version__}"
    there = (
        "a GPU is here, but nothing of this ran on it" if torch.cuda.is_available() else "no GPU"
    )
    yield f"{there}: these are figures of the CPU alone"
    low, high = min(bench.peaks) / 1e9, max(bench.peaks) / 1e9
    apart = unrest(bench.peaks)
    yield f"the GEMM peak went from {low:.0f} to {high:.0f} GFLOP/s, {apart:.0%} of the median"
    verdict = "NOISY MACHINE, measure again" if apart > NOISY else "a quiet machine"
    yield f"load average at the start {load:.1f}: {verdict}"
    if any(t.cold is None for timings in bench.timings.values() for t in timings.values()):
        yield f"what did not finish in {STEP_SECONDS:.0f} s counts as if it had; it is slower still"
    yield "ours has the norms of queries and keys that Llama lacks; engine also clips gradients"


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.training.bench", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="one round at tiny sizes")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else 130)
    measure(QUICK if options.quick else FULL, options.root, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
