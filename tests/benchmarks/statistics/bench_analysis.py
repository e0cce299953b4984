"""Speed of the analysis: starts, bootstraps, profiles, the nested family, a whole report.

python -m tests.benchmarks.statistics.bench_analysis  a minute; writes reports/bench_analysis.json
python -m tests.benchmarks.statistics.bench_analysis --rounds 1 --root folder

Each figure is the median of several rounds, with the lowest and the highest beside it. A bound that
is missed on a busy machine is no failure of the command.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from analysis.fitting.estimator import Estimator, Fit, observed
from analysis.fitting.solver import Problem, solve
from analysis.inference.backtest import backtest
from analysis.inference.bootstrap import replicate
from analysis.inference.model_selection import choose
from analysis.inference.profile_likelihood import profile
from analysis.laws.catalog import CHINCHILLA, GAMMA, KAPLAN, nested_family
from analysis.report.write import write_report
from launch.measurements import Measurement, write_measurements
from tests.analysis.synthetic_study import Study, write

ROOT = Path(__file__).parents[3]
DELTA = 1e-3


def points(count: int, arms: int) -> pd.DataFrame:
    """Runs of a Chinchilla law over four decades of compute, each its own trunk."""
    generator = np.random.default_rng(0)
    size = 10 ** generator.uniform(7.5, 10, count)
    tokens = size * 10 ** generator.uniform(0.5, 2.3, count)
    arm = np.arange(count) % arms
    loss = 1.8 + 480 * size**-0.35 + (2100 + 150 * arm) * tokens**-0.37
    names = [str(place) for place in range(count)]
    return pd.DataFrame(
        {
            "parameters": size,
            "tokens": tokens,
            "flops": 6 * size * tokens,
            "loss_nats": loss * np.exp(generator.normal(0, 0.007, count)),
            "architecture": arm.astype(str),
            "corpus": "web",
            "trunk_id": names,
        }
    )


def hundred_runs(folder: Path) -> Path:
    """A sweep folder of 108 runs: three architectures, corpora, sizes and horizons."""
    study = Study(
        architectures=("transformer", "mamba", "monarch"),
        corpora=("web", "code", "books"),
        sizes={"r9k": 9e3, "r30k": 3e4, "r100k": 1e5},
        horizons=(4.5e5, 9e5, 1.8e6),
        seeds={"r30k": (0, 1)},
    )
    return write(study, folder, np.random.default_rng(3))


def tasks(scratch: Path) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, with its bound in seconds."""
    rows, pair = points(240, 1), points(150, 2)
    sweep = hundred_runs(scratch / "hundred")
    fit = Estimator(delta=DELTA).fit(rows, CHINCHILLA)
    assert isinstance(fit, Fit)
    generator = np.random.default_rng(1)
    low, high = np.array([-3, 0.05, -3, 0.05, -1.5]), np.array([1, 1.2, 1, 1.2, 1.0])
    starts = generator.uniform(low, high, (1024, 5))
    problem = Problem(fit.form.design(rows), observed(rows, CHINCHILLA), np.ones(240), DELTA)

    def from_random_starts() -> None:
        _, reached = solve(problem, starts, 1e-9)
        assert reached.min() <= fit.objective * (1 + 1e-6)

    def family() -> None:
        found = choose(pair, nested_family(("architecture",)))
        for each in found.fits.values():
            replicate(each, 300 // len(found.fits), np.random.default_rng(0))

    return {
        "1,024 starts on 240 points": (from_random_starts, 1.0),
        "4,000 clustered bootstraps of 240 points": (
            lambda: replicate(fit, 4000, np.random.default_rng(0)),
            8.0,
        ),
        "nested family on 150 points, 300 bootstraps": (family, 5.0),
        "profiles of 5 parameters": (lambda: [profile(fit, n) for n in fit.form.labels], 3.0),
        "back-test of three laws": (
            lambda: [backtest(Estimator(), rows, law) for law in (CHINCHILLA, GAMMA, KAPLAN)],
            10.0,
        ),
        "report of a sweep of 108 runs": (lambda: write_report(sweep), 60.0),
    }


def main(words: list[str]) -> int:
    """Time every task and print it; always 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.statistics.bench_analysis", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=ROOT, help="where reports/ is written")
    options = parser.parse_args(words)
    console, rows = Console(width=100), []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        for name, (task, bound) in tasks(Path(scratch)).items():
            wall, own = [], []
            for _ in range(options.rounds):
                clock, work = time.perf_counter(), time.process_time()
                task()
                wall.append(time.perf_counter() - clock)
                own.append(time.process_time() - work)
            middle = statistics.median(wall)
            rows.append(Measurement(name, middle, "s", bound))
            rows.append(Measurement(f"{name}: processor", statistics.median(own), "s"))
            console.print(
                f"{name:44s} {middle:6.2f} s [{min(wall):.2f}, {max(wall):.2f}], processor "
                f"{statistics.median(own):.2f} s, bound {bound:.0f} s"
            )
    write_measurements("bench_analysis", rows, options.root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
