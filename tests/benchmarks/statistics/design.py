"""A demonstration on simulated truths: what the design advisor saves against an isoFLOP grid.

python -m tests.benchmarks.statistics.design [--repetitions 8]

For each truth a grid of five isoFLOP budgets is simulated and fitted, and its interval for ln L at
1e22 FLOP is the width to reach. The advisor starts from a small pilot and adds runs, three at a
time, until its own interval, made in the same way, is as narrow. Every interval holds the spread
between three laws. Nothing is trained.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Estimator, Fit
from analysis.laws.bound import bind, log_loss, log_loss_and_jacobian
from analysis.laws.catalog import CHINCHILLA, GAMMA, KAPLAN
from analysis.laws.law import Law
from analysis.planning.next_runs import Belief, Terms, advise, half_width, loss_at
from tests.analysis.parameters import theta_of

SIGMA = 0.004
LAWS = (CHINCHILLA, KAPLAN, GAMMA)
EPOCH = {"A": 477.83, "alpha": 0.3473, "B": 2143.4, "beta": 0.3672, "E": 1.8172}
OUTER_POWER = {"A": 4000.0, "alpha": 0.47, "B": 30000.0, "beta": 0.5, "E": 1.75, "power": 0.72}
TRUTHS: dict[str, tuple[Law, dict[str, float]]] = {
    "a Chinchilla law (the replication's fit)": (CHINCHILLA, EPOCH),
    "a law with an outer exponent of .72, not assumed alone": (GAMMA, OUTER_POWER),
}
TARGET_FLOPS = 1e22
LARGEST = 6e19
DRAWS = 8
ROUNDS = 40


@dataclass(frozen=True)
class Outcome:
    """One repetition: what was spent and known, by the grid and by the advisor."""

    grid_flops: float
    grid_width: float
    grid_error: float
    flops: float
    width: float
    error: float

    @property
    def reached(self) -> bool:
        """Whether the advisor's interval became as narrow as the grid's."""
        return self.width <= self.grid_width


def main(words: Sequence[str]) -> int:
    """Run the demonstration; returns 1 if the advisor saves nothing in the middle case."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.statistics.design", description=__doc__
    )
    parser.add_argument("--repetitions", type=int, default=8)
    repetitions, saved = parser.parse_args(words).repetitions, True
    for name, (law, values) in TRUTHS.items():
        found = [
            repetition(law, values, np.random.default_rng(seed)) for seed in range(repetitions)
        ]
        sys.stdout.write(summary(name, found) + "\n")
        saved &= float(np.median([each.flops / each.grid_flops for each in found])) < 1.0
    return 0 if saved else 1


def repetition(law: Law, values: dict[str, float], generator: np.random.Generator) -> Outcome:
    """One simulated study of each kind, under the same truth and noise."""
    point = _runs([np.sqrt(TARGET_FLOPS / 120)], [20.0])
    exact = np.log(_loss(law, values, point)[0])
    grid = _measured(isoflop_runs(), law, values, generator)
    beliefs, guess = _beliefs(grid, point, generator)
    wanted = half_width(grid, beliefs, loss_at(point), SIGMA)
    grid_error = abs(guess - exact)
    done = _measured(pilot(), law, values, generator)
    options = candidates()
    for _ in range(ROUNDS):
        beliefs, guess = _beliefs(done, point, generator)
        width = half_width(done, beliefs, loss_at(point), SIGMA)
        left = float(grid["flops"].sum() - done["flops"].sum())
        terms = Terms(SIGMA, left, wanted, 3, 0.0)
        advice = advise(done, options, beliefs, loss_at(point), terms)
        more = advice.runs[advice.runs["role"] == "fit"]
        if width <= wanted or not len(more):
            break
        added = _measured(more[["parameters", "tokens", "flops"]], law, values, generator)
        done = pd.concat([done, added], ignore_index=True)
    spent = float(done["flops"].sum())
    return Outcome(float(grid["flops"].sum()), wanted, grid_error, spent, width, abs(guess - exact))


def summary(name: str, found: Sequence[Outcome]) -> str:
    """One paragraph on a truth."""
    shares = np.array([each.flops / each.grid_flops for each in found])
    covered = [
        sum(each.error <= each.width for each in found),
        sum(each.grid_error <= each.grid_width for each in found),
    ]
    return (
        f"Truth: {name}. {len(found)} repetitions; the grid costs {found[0].grid_flops:.2g} FLOP "
        f"and knows ln L at {TARGET_FLOPS:.0e} FLOP to +-"
        f"{np.median([each.grid_width for each in found]):.4f} (median).\n"
        f"  The advisor is as narrow in {sum(each.reached for each in found)} of {len(found)}, "
        f"for a median {np.median(shares):.0%} of the FLOPs (from {shares.min():.0%} to "
        f"{shares.max():.0%}).\n"
        f"  Median error: advisor {np.median([each.error for each in found]):.4f}, grid "
        f"{np.median([each.grid_error for each in found]):.4f}; the interval held the truth in "
        f"{covered[0]} and {covered[1]} of {len(found)}."
    )


def isoflop_runs() -> pd.DataFrame:
    """Five budgets of seven sizes, +-4x around D/N = 20."""
    parts = []
    for budget in np.geomspace(LARGEST / 100, LARGEST, 5):
        sizes = np.sqrt(budget / 120) * np.geomspace(0.25, 4, 7)
        tokens = budget / 6 / sizes
        parts.append(pd.DataFrame({"parameters": sizes, "tokens": tokens, "flops": budget}))
    return pd.concat(parts, ignore_index=True)


def pilot() -> pd.DataFrame:
    """Twelve small runs: four sizes at three ratios of tokens to parameters."""
    return _runs(np.geomspace(1e7, 4e7, 4), [5.0, 40.0, 300.0])


def candidates() -> pd.DataFrame:
    """What may be run next: D/N from 5 to 300, no run larger than the grid's largest."""
    rows = _runs(np.geomspace(1e7, 2e9, 24), np.geomspace(5, 300, 10))
    return rows[rows["flops"] <= LARGEST].reset_index(drop=True)


def _runs(
    sizes: Sequence[float] | np.ndarray, ratios: Sequence[float] | np.ndarray
) -> pd.DataFrame:
    n, m = np.meshgrid(np.asarray(sizes), np.asarray(ratios))
    frame = pd.DataFrame({"parameters": n.ravel(), "tokens": (n * m).ravel()})
    return frame.assign(flops=6 * frame["parameters"] * frame["tokens"])


def _loss(law: Law, values: dict[str, float], rows: pd.DataFrame) -> np.ndarray:
    form = bind(law, rows)
    return np.exp(log_loss(form.design(rows), theta_of(form, values)[None])[0])


def _measured(
    rows: pd.DataFrame, law: Law, values: dict[str, float], generator: np.random.Generator
) -> pd.DataFrame:
    noise = np.exp(generator.normal(0, SIGMA, len(rows)))
    names = [f"run {generator.integers(2**60)}" for _ in range(len(rows))]
    return rows.assign(loss_nats=_loss(law, values, rows) * noise, trunk_id=names)


def _beliefs(
    rows: pd.DataFrame, point: pd.DataFrame, generator: np.random.Generator
) -> tuple[list[Belief], float]:
    """Each law that fits, with draws around its optimum, and their mean prediction of ln L."""
    beliefs, guesses = [], []
    for law in LAWS:
        fitted = Estimator(delta=np.inf, starts=4).fit(rows, law)
        if not isinstance(fitted, Fit):
            continue
        jacobian = log_loss_and_jacobian(fitted.form.design(rows), fitted.theta[None])[1][0]
        precision = jacobian.T @ jacobian / SIGMA**2 + np.eye(len(fitted.theta)) / 4
        root = np.linalg.cholesky(np.linalg.inv(precision))
        # Draws spread half as far as the data allow: local information is only good nearby.
        draws = 0.5 * generator.normal(size=(DRAWS, len(fitted.theta))) @ root.T
        beliefs.append(Belief(fitted.form, fitted.theta + draws - draws.mean(axis=0)))
        guesses.append(float(log_loss(fitted.form.design(point), fitted.theta[None])[0, 0]))
    return beliefs, float(np.mean(guesses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
