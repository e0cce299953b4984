"""What the intervals are worth: thousands of synthetic studies whose truth is known.

python -m tests.benchmarks.statistics.recovery
    2,000 studies of each kind; writes reports/recovery.json
python -m tests.benchmarks.statistics.recovery --draws 200
    a tenth of it

Fits never see the truth: every start comes from the data. Half of the studies inside the data come
from laws that are not fitted, with residuals of a real table where it is at hand (else with those
of Student's t). Seeds derive from the name of the study's kind. All fit Chinchilla's law.
"""

import argparse
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from scipy import stats

from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.backtest import forecast
from analysis.inference.cluster_robust import sandwich
from analysis.inference.intervals import Interval
from analysis.inference.model_selection import effect
from analysis.inference.shape_robust import shape_robust
from analysis.laws.catalog import CHINCHILLA, nested_family
from launch.measurements import Measurement, write_measurements
from tests.laws.published import chinchilla_points, kept, references

T = TypeVar("T")
ROOT = Path(__file__).parents[3]
LIGHT = Estimator(grid=np.geomspace(0.03, 1.3, 12), starts=4, tolerance=1e-10)
INSIDE = ("iid", "clustered", "other law", "foreign law")
ENOUGH = 1000
"""Draws from which a share is judged as it stands."""
MOST_BIAS = 0.5
"""Mean error in units of the standard error."""
POWER_EFFECT = 0.01
"""A one per cent lower loss: what the power beside the false-positive rate is for."""


@dataclass(frozen=True)
class Drawn:
    """One synthetic study: its runs, the true ln L of any run, and the true parameters."""

    rows: pd.DataFrame
    truth: Callable[[pd.DataFrame], np.ndarray]
    parameters: dict[str, float]


def generator_of(name: str, draw: int) -> np.random.Generator:
    """Random numbers that depend on the name of what is tried and on the draw alone."""
    return np.random.default_rng([zlib.crc32(name.encode()), draw])


def grid(sizes: int, ratios: int, span: float = 2.0) -> pd.DataFrame:
    """Sizes over `span` decades times tokens per parameter from 5 to 200."""
    size, ratio = np.geomspace(1e7, 1e7 * 10**span, sizes), np.geomspace(5, 200, ratios)
    points = [{"parameters": n, "tokens": n * r} for n in size for r in ratio]
    return pd.DataFrame(points).assign(size=np.repeat(np.arange(sizes), ratios))


def with_loss(rows: pd.DataFrame, truth: np.ndarray, noise: np.ndarray) -> pd.DataFrame:
    return rows.assign(
        loss_nats=np.exp(truth + noise), flops=6.0 * rows["parameters"] * rows["tokens"]
    )


def draw_inside(kind: str, draw: int) -> Drawn:
    """Thirty runs, or sixty of two seeds whose points share the luck of their trunk."""
    generator = generator_of(kind, draw)
    if kind == "foreign law":
        law, rows = unfitted_law(generator), grid(6, 5)
        noise = generator.choice(_residuals(), len(rows))
        return Drawn(with_loss(rows, law(rows), noise), law, {})
    p = _parameters(generator)
    if kind == "other law":
        p["power"] = generator.uniform(0.6, 0.9)
    rows = grid(6, 5)

    def truth(at: pd.DataFrame) -> np.ndarray:
        size = p["A"] * (at["parameters"] / 1e8) ** -p["alpha"]
        data = p["B"] * (at["tokens"] / 3e9) ** -p["beta"]
        return np.log(p["E"] + (size + data) ** p.get("power", 1.0)).to_numpy()

    if kind == "clustered":
        rows = pd.concat([rows.assign(seed=seed) for seed in (0, 1)], ignore_index=True)
        trunk = (2 * rows["size"] + rows["seed"]).to_numpy()
        noise = generator.normal(0, 0.003, 12)[trunk] + generator.normal(0, 0.003, len(rows))
        rows = rows.assign(trunk_id=trunk.astype(str))
    elif kind == "other law":
        noise = generator.choice(_residuals(), len(rows))
    else:
        noise = generator.normal(0, 0.005, len(rows))
    return Drawn(with_loss(rows, truth(rows), noise), truth, p)


def _parameters(generator: np.random.Generator) -> dict[str, float]:
    """Terms at the centre of the data from .3 to 1.2 nats, exponents from .25 to .45."""
    names = {"E": (1.5, 2.2), "A": (0.3, 1.2), "alpha": (0.25, 0.45), "B": (0.3, 1.2),
             "beta": (0.25, 0.45)}  # fmt: skip
    return {name: float(generator.uniform(*ends)) for name, ends in names.items()}


_CACHE: dict[str, np.ndarray] = {}


def _residuals() -> np.ndarray:
    if "residuals" not in _CACHE:
        # Residuals of the default fit have the centre that such fits look for: they are skewed.
        found = Estimator().fit(kept(chinchilla_points()), CHINCHILLA) if references() else None
        student = 0.004 * generator_of("student", 0).standard_t(4, 240)
        _CACHE["residuals"] = found.residuals if isinstance(found, Fit) else student
    return _CACHE["residuals"]


def inside(kind: str, draw: int) -> dict[str, tuple[float, float]] | None:
    """Per quantity: the t statistic of its error, and the quantile it is held against."""
    drawn = draw_inside(kind, draw)
    law = LIGHT.fit(drawn.rows, CHINCHILLA)
    if not isinstance(law, Fit) or (robust := shape_robust(law)) is None:
        return None
    generator = generator_of(kind + " asked", draw)
    size, ratio = 10 ** generator.uniform(7.2, 8.8, 2), 10 ** generator.uniform(0.9, 2.1, 2)
    places = pd.DataFrame({"parameters": size, "tokens": size * ratio})
    predicted = robust.predict(places)
    miss = (predicted.log - drawn.truth(places)) / predicted.error
    quantile = stats.t.ppf(0.975, predicted.freedom)
    values = {f"loss {i}": (float(miss[i]), float(quantile[i])) for i in range(2)}
    spread = sandwich(law)
    for name in ("alpha", "beta") if kind in ("iid", "clustered") else ():
        slot = law.form.labels.index(name)
        error, freedom = spread.error_and_freedom(np.eye(5)[[slot]])
        miss = (float(law.theta[slot]) - drawn.parameters[name]) / error[0]
        values[name] = (float(miss), float(stats.t.ppf(0.975, freedom[0])))
    return values


def differs(kind: str, draw: int, shift: float) -> bool | None:
    """Whether the interval of the architecture effect excludes none; `shift` is the true one."""
    generator = generator_of(f"differs {kind}", draw)
    p = _parameters(generator)
    rows = pd.concat(
        [grid(6, 4).assign(architecture=name, arm=arm) for arm, name in enumerate("ab")],
        ignore_index=True,
    )
    size = p["A"] * (rows["parameters"] / 1e8) ** -p["alpha"]
    data = p["B"] * (rows["tokens"] / 3e9) ** -p["beta"]
    truth = np.log(p["E"] + size + data).to_numpy() + shift * rows["arm"].to_numpy()
    noise = generator.normal(0, 0.004, len(rows))
    if kind == "clustered":
        trunk = (6 * rows["arm"] + rows["size"]).to_numpy()
        noise = generator.normal(0, 0.004, 12)[trunk] + 0.5 * noise
        rows = rows.assign(trunk_id=trunk.astype(str))
    found = LIGHT.fit(with_loss(rows, truth, noise), nested_family(("architecture",))["Mab"])
    between = effect(found, "a", "b") if isinstance(found, Fit) else None
    return between.excludes(0.0) if isinstance(between, Interval) else None


def extrapolated(draw: int) -> tuple[list[bool], list[bool]] | None:
    """Whether intervals cover larger runs of a law that is none of the fitted ones.

    Second, the same for intervals without the terms of the back-test and of the other laws.
    """
    generator = generator_of("extrapolation", draw)
    law = unfitted_law(generator)
    rows = grid(7, 4, span=float(generator.uniform(1.6, 2.2)))
    noise_of = float(generator.uniform(0.002, 0.006))
    rows = with_loss(rows, law(rows), generator.normal(0, noise_of, len(rows)))
    found = LIGHT.fit(rows, CHINCHILLA)
    if not isinstance(found, Fit):
        return None
    largest = float(rows["parameters"].max())
    size, ratio = largest * np.array([1.5, 2.2, 3.0]), np.array([20.0, 60.0, 150.0])
    beyond = pd.DataFrame({"parameters": size, "tokens": size * ratio})
    seen = np.exp(law(beyond) + generator.normal(0, noise_of, 3))
    beyond = beyond.assign(flops=6.0 * beyond["parameters"] * beyond["tokens"])
    forecasts = forecast(found, LIGHT, beyond).rows
    full = ((forecasts["low"] <= seen) & (seen <= forecasts["high"])).tolist()
    bare = 2.0 * np.hypot(forecasts["s_fit"], forecasts["sigma"])
    narrow = (np.abs(np.log(seen / forecasts["estimate"])) <= bare).tolist()
    return full, narrow


def unfitted_law(generator: np.random.Generator) -> Callable[[pd.DataFrame], np.ndarray]:
    """A law from one of three families that no estimator here fits."""
    p = _parameters(generator)
    family = int(generator.integers(3))
    curvature = float(generator.uniform(0.01, 0.05))

    def truth(at: pd.DataFrame) -> np.ndarray:
        u = np.log(at["parameters"].to_numpy(dtype=float) / 1e8)
        v = np.log(at["tokens"].to_numpy(dtype=float) / 3e9)
        if family == 0:
            # Exponents that shrink with scale.
            terms = p["A"] * np.exp(-p["alpha"] * u + curvature * u**2)
            return np.log(p["E"] + terms + p["B"] * np.exp(-p["beta"] * v + curvature * v**2))
        if family == 1:
            # Size changes the exponent of the data (Li et al. 2506.10972, in spirit).
            exponent = p["beta"] * np.exp(-2 * curvature * u)
            return np.log(
                p["E"] + p["A"] * np.exp(-p["alpha"] * u) + p["B"] * np.exp(-exponent * v)
            )
        # A term that neither size nor data alone removes.
        joint = 10 * curvature * np.exp(-0.1 * (u + v))
        terms = p["A"] * np.exp(-p["alpha"] * u) + p["B"] * np.exp(-p["beta"] * v)
        return np.log(p["E"] + terms + joint)

    return truth


@dataclass(frozen=True)
class Rate:
    """A share of draws, with the range that two standard errors of counting leave."""

    name: str
    hits: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.count

    def holds(self) -> bool:
        """Whether the share is inside the range; few draws may miss it by counting error."""
        inside = self.low <= self.value <= self.high
        return inside if self.count >= ENOUGH else self.compatible()

    def compatible(self) -> bool:
        """Whether the counts could come from a true rate inside [low, high] (at 1 in 1,000)."""
        below = stats.binom.cdf(self.hits, self.count, self.low)
        above = stats.binom.sf(self.hits - 1, self.count, self.high)
        return bool(min(below, above) > 1e-3) if self.count else False


class Draws:
    """Draws of one study after the other, shared out among processes.

    Args:
        count: draws of each kind.
        pool: what runs them; this process where there is none.
        console: where progress is shown, if anywhere.
    """

    def __init__(
        self, count: int, pool: Executor | None = None, console: Console | None = None
    ) -> None:
        self.count, self._pool, self._console = count, pool, console

    def of(self, name: str, one: Callable[[int], T | None], share: int = 1) -> list[T]:
        """What every draw, or one in `share`, gave, without those that could not be fitted."""
        numbers = range(max(self.count // share, 1))
        given = self._pool.map(one, numbers, chunksize=5) if self._pool else map(one, numbers)
        seen = track(
            given, name, len(numbers), console=self._console, transient=True,
            disable=self._console is None,
        )  # fmt: skip
        return [value for value in seen if value is not None]

    def coverage(self, kind: str) -> tuple[list[Rate], dict[str, float]]:
        """Coverage of each quantity, and its mean error in units of the standard error."""
        found = self.of(kind, partial(inside, kind))
        rates, bias = [], {}
        for name in found[0]:
            pairs = np.array([value[name] for value in found])
            hits = int((np.abs(pairs[:, 0]) <= pairs[:, 1]).sum())
            rates.append(Rate(f"{kind}: {name}", hits, len(found), 0.935, 0.965))
            bias[f"{kind}: {name}"] = float(np.clip(pairs[:, 0], -10, 10).mean())
        return rates, bias

    def positives(self, kind: str, shift: float, share: int = 1) -> Rate:
        """How often two arms are said to differ."""
        what = "false positives" if shift == 0 else f"power at {100 * shift:g} %"
        found = self.of(f"{kind}: {what}", partial(differs, kind, shift=shift), share)
        ends = (0.035, 0.065) if shift == 0 else (0.0, 1.0)
        return Rate(f"{kind}: {what}", sum(found), len(found), *ends)

    def extrapolation(self, share: int = 1) -> tuple[Rate, Rate]:
        """Coverage beyond the data, with and without the terms for a wrong law."""
        found = self.of("beyond", extrapolated, share)
        full, bare = ([hit for each in found for hit in each[place]] for place in (0, 1))
        return (
            Rate("beyond: with back-test", sum(full), len(full), 0.85, 1.0),
            Rate("beyond: fit and noise alone", sum(bare), len(bare), 0.0, 1.0),
        )

    def all(self) -> Iterator[tuple[list[Rate], dict[str, float]]]:
        """Every study, part by part, so that each is printed when it is done."""
        for kind in INSIDE:
            yield self.coverage(kind)
        for kind in ("iid", "clustered"):
            yield [self.positives(kind, 0.0), self.positives(kind, -POWER_EFFECT, 4)], {}
        yield list(self.extrapolation()), {}


def main(words: list[str]) -> int:
    """Run every study and print it; 1 if a rate is outside its range."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.statistics.recovery", description=__doc__
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--root", type=Path, default=ROOT, help="where reports/ is written")
    options = parser.parse_args(words)
    console, start = Console(width=100), time.time()
    if not references():
        console.print(
            "No published table is at hand (CROSSLADDER_PUBLISHED names its folder): residuals of "
            "Student's t stand in for those that the studies of other laws are judged by."
        )
    rows: list[Measurement] = []
    good = True
    # One thread for each process: the matrices are small.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for rates, bias in Draws(options.draws, pool, console).all():
            good &= all(rate.holds() for rate in rates)
            good &= all(abs(value) < MOST_BIAS for value in bias.values())
            for rate in rates:
                _print(console, rate)
                rows.append(Measurement(rate.name, rate.value, "share"))
            for name, value in bias.items():
                console.print(f"{name:34s} bias {value:+.2f} standard errors, of at most 0.50")
                rows.append(Measurement(f"{name}: bias", abs(value), "standard errors", MOST_BIAS))
    console.print(f"{time.time() - start:.0f} s")
    write_measurements("recovery", rows, options.root)
    return 0 if good else 1


def _print(console: Console, rate: Rate) -> None:
    se = math.sqrt(rate.value * (1 - rate.value) / rate.count)
    free = (rate.low, rate.high) == (0.0, 1.0)
    verdict = "" if free else "ok" if rate.holds() else "OUTSIDE"
    console.print(
        f"{rate.name:34s} {100 * rate.value:6.2f} % +- {100 * se:.2f}  of {rate.count:5d}"
        f"  [{100 * rate.low:.1f}, {100 * rate.high:.1f}] {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
