"""What the profile's benchmark finds of a contender, and the rows, verdicts and tables of it."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from rich.table import Table

from launch.measurements import Measurement
from tests.benchmarks.training.bench_architectures import GROUPS, SHARE_GOALS, Plan
from tests.benchmarks.training.bench_models import Built, Task
from tests.benchmarks.training.bench_rows import spread_rows, unrest
from tests.benchmarks.training.step_profile import GROUPS as TIME_GROUPS
from tests.benchmarks.training.step_profile import LIGHT


@dataclass(frozen=True)
class Contender:
    """What is profiled; `compiled` is only timed, and only where it has a goal of its own."""

    name: str
    architecture: str
    make: Callable[[Task], Built]
    plan: Plan

    def task(self) -> Task:
        return Task(self.plan.size.shape(self.architecture), self.plan.size)

    def timed(self) -> dict[str, Callable[[Task], Built]]:
        """What is timed beside it, by what is added to its name."""
        compiled = f"{self.name} compiled"
        if compiled not in SHARE_GOALS:
            return {"": self.make}
        return {"": self.make, " compiled": GROUPS[self.architecture]["ours compiled"]}


@dataclass
class Found:
    """What a contender's process found.

    Attributes:
        shares: of the peak, one a round, by what is added to its name.
        seconds: of its own steps.
        peaks: FLOP/s of the square product.
        flops: model FLOPs of a step.
        run_over_model: FLOPs of the products that were run, over those.
        products: FLOP/s of all products at their own shapes, each alone.
        profile: milliseconds by group.
        least: milliseconds by term, passes fused; `written`: passes as the program has them;
            `cached`: passes fused, and what is run repeated by itself.
        rates: of the machine, with units.
    """

    flops: float
    shares: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    run_over_model: float = math.nan
    products: float = math.nan
    profile: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)
    rates: list[Measurement] = field(default_factory=list)

    def ideal(self) -> float:
        """Milliseconds of the model FLOPs at the best peak."""
        return 1e3 * self.flops / max(self.peaks)

    def bound_share(self, terms: dict[str, float]) -> float:
        """Share of the best peak of a step that takes no longer than its terms."""
        return self.ideal() / sum(terms.values())

    def excess(self, terms: dict[str, float]) -> dict[str, float]:
        """Milliseconds of each term beyond the time that its model FLOPs take at the peak."""
        by_products = min(1.0, self.run_over_model)
        other = max(("attention kernel", "FFT"), key=lambda name: terms[name])
        free = {"products": by_products, other: 1.0 - by_products}
        return {name: ms - free.get(name, 0.0) * self.ideal() for name, ms in terms.items()}


def capped(terms: Mapping[str, float], profiles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Terms, none above the least that steps took for the same: what was done can be done."""
    seen = [{**each, "passes": sum(each[group] for group in LIGHT)} for each in profiles]
    return {term: min(value, *(each[term] for each in seen)) for term, value in terms.items()}


def rows_of(contender: Contender, found: Found) -> Iterator[Measurement]:
    """The figures of one contender."""
    name = contender.name
    for word, shares in found.shares.items():
        goal = SHARE_GOALS.get(f"{name}{word}") if contender.plan.goals else None
        label = f"{name}{word}: share of GEMM peak"
        yield from spread_rows(label, shares, "", goal, higher=True)
    yield from spread_rows(f"{name}: step", [1e3 * s for s in found.seconds], "ms")
    bounds = {"least": found.least, "as written": found.written, "in caches": found.cached}
    for label, terms in bounds.items():
        yield Measurement(f"{name}: bound {label}, share", found.bound_share(terms), "")
        for term, value in terms.items():
            yield Measurement(f"{name}: bound {label}, {term}", value, "ms")
    for group, value in found.profile.items():
        yield Measurement(f"{name}: profile, {group}", value, "ms")
    rate = found.products / max(found.peaks)
    yield Measurement(f"{name}: rate of its products over the peak", rate, "ratio")
    yield Measurement(f"{name}: FLOPs of products run over model's", found.run_over_model, "ratio")
    yield Measurement(f"{name}: GEMM peak, highest", max(found.peaks) / 1e9, "GFLOP/s")
    yield Measurement(f"{name}: GEMM peak, range over median", unrest(found.peaks), "ratio")
    yield from (replace(rate, name=f"{name}: {rate.name}") for rate in found.rates)


def verdict(goal: float | None, share: float, found: Found) -> str:
    """What holds a contender, in words."""
    least, written = (found.bound_share(terms) for terms in (found.least, found.written))
    excess = found.excess(found.least)
    term = max(excess, key=lambda name: excess[name])
    holds = f"{term}, {excess[term]:.0f} ms beyond the peak's time"
    if goal is None:
        return f"no goal; most is lost in {holds}"
    if share >= goal:
        return f"goal kept; most is lost in {holds}"
    if least < goal:
        return f"BOUND below the goal, held by {holds}"
    if written < goal:
        passes = found.written["passes"] - found.least["passes"]
        return f"GAP OF OURS: passes as written cost {passes:.0f} ms more than the least"
    return "GAP OF OURS: both bounds lie above the goal; see the profile against the bound"


def verdict_table(pairs: Sequence[tuple[Contender, Found]], *, goals: bool) -> Table:
    """Goal, measured share and bounds of each."""
    table = Table(title="share of the GEMM peak: goal, measured, and what its parts allow")
    for heading in ("contender", "goal", "measured", "as written", "least", "in caches"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    table.add_column("what holds it")
    for contender, found in pairs:
        each = (found.written, found.least, found.cached)
        bounds = [found.bound_share(terms) for terms in each]
        for word, shares in found.shares.items():
            name, share = f"{contender.name}{word}", statistics.median(shares)
            goal = SHARE_GOALS.get(name) if goals else None
            shown = [f"{goal:.0%}" if goal else "", *(f"{x:.1%}" for x in (share, *bounds))]
            table.add_row(name, *shown, verdict(goal, share, found))
    return table


def time_table(contender: Contender, found: Found) -> Table:
    """The profile of a step."""
    total = found.profile["total"]
    table = Table(title=f"{contender.name}: {total:.0f} ms under the profiler")
    for heading in ("group", "ms a step", "share", "bound as written, ms", "least bound, ms"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for group in TIME_GROUPS:
        value = found.profile[group]
        bounds = [f"{t[group]:.1f}" if group in t else "" for t in (found.written, found.least)]
        table.add_row(group, f"{value:.1f}", f"{value / total:.1%}", *bounds)
    bounds = [f"{terms['passes']:.1f}" for terms in (found.written, found.least)]
    light = sum(found.profile[group] for group in LIGHT)
    table.add_row(
        "passes, the four groups of them", f"{light:.1f}", f"{light / total:.1%}", *bounds
    )
    return table


def times_of(pairs: Sequence[tuple[Contender, Found]]) -> pd.DataFrame:
    """Milliseconds by contender, bar and term, as the figure has them."""
    rows = []
    for contender, found in pairs:
        profile = {g: ms for g, ms in found.profile.items() if g not in (*LIGHT, "total")}
        profile["passes"] = sum(found.profile[group] for group in LIGHT)
        bars = {"profile": profile, "bound as written": found.written, "least bound": found.least}
        for bar, terms in bars.items():
            each = {"contender": contender.name, "bar": bar}
            rows += [{**each, "term": term, "milliseconds": ms} for term, ms in terms.items()]
    return pd.DataFrame(rows)
