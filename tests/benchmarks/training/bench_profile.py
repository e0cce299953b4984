"""Where the time of a training step goes on this CPU, and the bound that holds its speed.

python -m tests.benchmarks.training.bench_profile
    all architectures, at d_model 512
python -m tests.benchmarks.training.bench_profile --architectures mamba2,m2
    some of them
python -m tests.benchmarks.training.bench_profile --quick
    one round at a tiny size

Sizes, contenders and goals are those of tests.benchmarks.training.bench_architectures. Each
contender has a process of its own: it is profiled, traced once, and then in each round its step and
every part of it are timed between two measurements of the GEMM peak. Of two steps the second
counts: the first finds the caches as something else left them. Shares are of the peak around each
step; a bound takes the best time of every part and the best peak. Missed goals are no failure of
the command.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from analysis.benchmarks.profile import draw
from launch.measurements import Measurement, write_measurements
from models.accounting import account
from tests.benchmarks.training.bench import NOISY, ROOT, gemm_flops
from tests.benchmarks.training.bench_architectures import FULL, GROUPS, QUICK, Plan
from tests.benchmarks.training.bench_models import THREADS, Built, bare
from tests.benchmarks.training.bench_peers import plain
from tests.benchmarks.training.bench_processes import Child, prepare_threads
from tests.benchmarks.training.bench_rows import unrest
from tests.benchmarks.training.profile_rows import (
    Contender,
    Found,
    capped,
    rows_of,
    time_table,
    times_of,
    verdict_table,
)
from tests.benchmarks.training.step_bound import Bound, measure_rates
from tests.benchmarks.training.step_profile import profile_step
from tests.benchmarks.training.step_trace import StepTrace

CHILD_SECONDS = 900.0
LARGE_BATCH = 8


def contenders(names: Sequence[str], plan: Plan) -> Iterator[Contender]:
    """One an architecture; of the Transformer also a larger batch and torch's plain block."""
    for name in names:
        yield Contender(f"{name} ours", name, bare, plan)
        if name == "transformer":
            large = replace(plan, size=replace(plan.size, batch=LARGE_BATCH))
            yield Contender("transformer plain block", name, plain, plan)
            yield Contender(f"transformer ours, batch {LARGE_BATCH}", name, bare, large)
            yield Contender(f"transformer plain block, batch {LARGE_BATCH}", name, plain, large)


def serve_profile(connection: Connection, contender: Contender) -> None:
    """Measure a contender in a process of its own; sends what was found."""
    prepare_threads()
    connection.send(_find(contender))


def _find(contender: Contender) -> Found:
    task, plan = contender.task(), contender.plan
    built = {word: make(task) for word, make in contender.timed().items()}
    for each in (*built.values(), *built.values()):
        each.step()
    counted = account(task.model, plan.size.seq_len).training_flops_per_token
    found = Found(counted * plan.size.tokens, {word: [] for word in built})
    trace = StepTrace()
    with trace:
        built[""].step()
    bound, rates = Bound(trace), measure_rates()
    found.peaks.append(gemm_flops(plan.gemm_side))
    profiles = []
    for _ in range(plan.rounds):
        for word, each in built.items():
            _time_step(each, found, word, plan.gemm_side)
        bound.measure()
        rates.raise_to(measure_rates())
        built[""].step()
        profiles.append(profile_step(built[""].step, 1))
    found.profile = min(profiles, key=lambda each: each["total"])
    found.run_over_model = trace.flops() / found.flops
    found.least, found.written = (
        capped({term: 1e3 * s for term, s in bound.terms(rates, fused=fused).items()}, profiles)
        for fused in (True, False)
    )
    alone = {term: 1e3 * s for term, s in bound.alone().items()}
    found.cached = capped({**found.least, **alone}, profiles)
    found.products = trace.flops() / (1e-3 * found.cached["products"])
    fastest = max(rates.passes.values())
    found.rates = [
        Measurement("fastest pass, in cache", fastest / 1e9, "GB/s"),
        Measurement("pass over main memory", rates.passes[max(rates.passes)] / 1e9, "GB/s"),
        Measurement("torch.exp in cache", rates.exponentials / 1e9, "1e9/s"),
    ]
    return found


def _time_step(built: Built, found: Found, word: str, side: int) -> None:
    built.step()
    begin = time.perf_counter()
    loss = built.step()
    seconds, before = time.perf_counter() - begin, found.peaks[-1]
    assert math.isfinite(loss), f"a loss of {loss} is no training step"
    found.peaks.append(gemm_flops(side))
    found.shares[word].append(found.flops / seconds / statistics.mean((before, found.peaks[-1])))
    if not word:
        found.seconds.append(seconds)


def measure(plan: Plan, names: Sequence[str], root: Path, console: Console) -> None:
    """Measure, write report and figure, and show both."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    (root / "reports").mkdir(parents=True, exist_ok=True)
    pairs: list[tuple[Contender, Found]] = []
    rows = [Measurement("load average at the start", load, "")]
    for contender in contenders(names, plan):
        child = Child(serve_profile, contender)
        found = child.answer(CHILD_SECONDS)
        if found is None:
            message = f"{contender.name}: did not finish in {CHILD_SECONDS:.0f} s"
            rows.append(Measurement(message, 1.0, ""))
            console.print(message, highlight=False)
            continue
        child.stop()
        pairs.append((contender, found))
        rows += rows_of(contender, found)
        console.print(time_table(contender, found))
    rows.append(Measurement("benchmark", time.monotonic() - begin, "s"))
    target = plan.target.replace("bench_architectures", "profile")
    path = write_measurements(target, rows, root)
    console.print(verdict_table(pairs, goals=plan.goals))
    if pairs:
        draw(times_of(pairs), target).save(root / "reports")
    if any(unrest(found.peaks) > NOISY for _, found in pairs):
        console.print("NOISY MACHINE: the GEMM peak moved by more than 15 %; measure again")
    console.print(f"{THREADS} threads; {path}, with .csv, .png and .svg beside it")


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training.bench_profile")
    parser.add_argument("--architectures", default=",".join(GROUPS), help="separated by commas")
    parser.add_argument("--quick", action="store_true", help="one round at a tiny size")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each, and of its parts")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    names = options.architectures.split(",")
    unknown = sorted(set(names) - set(GROUPS))
    if unknown:
        parser.error(f"unknown architectures {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    plan = QUICK if options.quick else replace(FULL, rounds=options.rounds)
    console = Console(width=None if sys.stdout.isatty() else 130)
    measure(plan, names, options.root, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
