"""What the benchmark makes of its measurements: rows against bounds, and the tables it shows."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from launch.measurements import Measurement
from models.accounting import account
from tests.benchmarks.training.bench_models import Size

STEP_SECONDS = 60.0
"""A step that takes longer is stopped, and its contender with it."""

# Goals, written down before anything was measured; one that is missed is reported as it is.
SHARE_BOUND = {"transformer d512 bare": 0.60}
PEER_BOUND = {
    "transformer d128": 1.0,
    "transformer d512": 1.0,
    "mamba d128": 1.0,
    "mamba d512": 1.0,
}
MAMBA_BOUND = {"d512 bare": 0.5}
START_UP_BOUND = 1.0
PEER_PARAMETERS_BOUND = 0.02
MATCH_BOUND = 0.01

IMPLEMENTATIONS = ("bare", "engine", "transformers")
ARCHITECTURES = ("transformer", "mamba")


@dataclass
class Timing:
    """What one contender did at one size.

    Attributes:
        setting: how it ran, where there was a choice.
        cold: seconds of its first step, or None if that was stopped.
        rounds: seconds of its step in each later round.
        stopped: whether a step was stopped.
    """

    parameters: int
    setting: str
    cold: float | None = None
    rounds: dict[int, float] = field(default_factory=dict)
    stopped: bool = False

    def seconds(self) -> dict[int, float]:
        """What its speed is taken from; a step that was stopped took at least the limit."""
        cold = STEP_SECONDS if self.cold is None else self.cold
        return self.rounds or {0: cold}

    def basis(self) -> str:
        """What `seconds` are, in words."""
        if self.rounds:
            return "1 step" if len(self.rounds) == 1 else f"{len(self.rounds)} steps"
        return "1 cold step" if self.cold is not None else f"did not finish in {STEP_SECONDS:.0f} s"


Timings = dict[tuple[str, str], Timing]
"""By architecture and implementation."""


def spread_rows(
    name: str,
    values: Sequence[float],
    unit: str,
    bound: float | None = None,
    *,
    higher: bool = False,
) -> Iterator[Measurement]:
    """The median, held against the bound, and how far the quartiles lie apart."""
    better = "higher" if higher else "lower"
    yield Measurement(name, statistics.median(values), unit, bound, better)
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        yield Measurement(f"{name}, quartile range", high - low, unit)


def peak_rows(peaks: Sequence[float]) -> Iterator[Measurement]:
    """The GEMM rate over the run."""
    yield Measurement("GEMM peak", statistics.median(peaks) / 1e9, "GFLOP/s")
    yield Measurement("GEMM peak, lowest", min(peaks) / 1e9, "GFLOP/s")
    yield Measurement("GEMM peak, highest", max(peaks) / 1e9, "GFLOP/s")
    yield Measurement("GEMM peak, range over median", unrest(peaks), "ratio")


def unrest(peaks: Sequence[float]) -> float:
    """How far the measured peaks lie apart, relative to their median."""
    return (max(peaks) - min(peaks)) / statistics.median(peaks)


def shares(size: Size, architecture: str, timing: Timing, peak: float) -> tuple[float, float]:
    """Share of the peak in model FLOPs alone, and with the scan's pointwise work."""
    counted = account(size.shape(architecture), size.seq_len)
    speed = size.tokens / statistics.median(timing.seconds().values()) / peak
    flops = counted.training_flops_per_token
    return flops * speed, (flops + counted.scan_flops_per_token) * speed


def speed_rows(size: Size, timings: Timings, peak: float) -> Iterator[Measurement]:
    """What each contender did at one size."""
    for (architecture, implementation), timing in timings.items():
        name = f"{architecture} {size.rung.name} {implementation}"
        speeds = [size.tokens / seconds for seconds in timing.seconds().values()]
        yield from spread_rows(f"{name}: speed", speeds, "tokens/s", higher=True)
        share, with_scan = shares(size, architecture, timing, peak)
        bound = SHARE_BOUND.get(name)
        yield Measurement(f"{name}: share of GEMM peak", share, "", bound, "higher")
        if architecture == "mamba":
            yield Measurement(f"{name}: share of GEMM peak, scan counted", with_scan, "")
        yield Measurement(f"{name}: parameters", timing.parameters, "")
        yield Measurement(f"{name}: steps timed after a warm-up", len(timing.rounds), "")
        stopped = float(timing.cold is None)
        yield Measurement(f"{name}: did not finish in {STEP_SECONDS:.0f} s", stopped, "")


def ratio_rows(size: Size, timings: Timings) -> Iterator[Measurement]:
    """Each contender against another, at one size."""
    yield from _peer_rows(size, timings)
    yield from _architecture_rows(size, timings)


def _peer_rows(size: Size, timings: Timings) -> Iterator[Measurement]:
    for architecture in ARCHITECTURES:
        bare, engine, peer = (timings[architecture, each] for each in IMPLEMENTATIONS)
        name = f"{architecture} {size.rung.name}"
        bound = PEER_BOUND.get(name)
        yield from _ratio_rows(f"{name}: speed of bare over transformers", bare, peer, bound)
        yield from _ratio_rows(f"{name}: speed of engine over transformers", engine, peer)
        yield from _ratio_rows(f"{name}: speed of engine over bare", engine, bare)
        apart = abs(peer.parameters / bare.parameters - 1)
        label = f"{name}: parameters of transformers apart from bare"
        yield Measurement(label, apart, "ratio", PEER_PARAMETERS_BOUND)


def _architecture_rows(size: Size, timings: Timings) -> Iterator[Measurement]:
    width = size.rung.name
    for kind in ("bare", "engine"):
        name = f"{width} {kind}"
        mamba, transformer = timings["mamba", kind], timings["transformer", kind]
        label = f"{name}: speed of mamba over transformer"
        yield from _ratio_rows(label, mamba, transformer, MAMBA_BOUND.get(name))
    mamba, transformer = timings["mamba", "bare"], timings["transformer", "bare"]
    apart = abs(mamba.parameters / transformer.parameters - 1)
    yield Measurement(f"{width}: parameters of mamba apart", apart, "ratio", MATCH_BOUND)


def _ratio_rows(
    name: str, top: Timing, bottom: Timing, bound: float | None = None
) -> Iterator[Measurement]:
    """Ratios of speeds within the rounds that both took part in, else of what there is."""
    above, below = top.seconds(), bottom.seconds()
    ratios = [below[r] / above[r] for r in sorted(above.keys() & below.keys())]
    if not ratios:
        ratios = [statistics.median(below.values()) / statistics.median(above.values())]
    yield from spread_rows(name, ratios, "ratio", bound, higher=True)


def speed_table(sizes: dict[Size, Timings], peak: float) -> Table:
    """Speed of every contender; quartiles in brackets."""
    table = Table(title="training step: forward, loss, backward, AdamW; fp32; median and quartiles")
    for heading in ("contender", "parameters", "tokens/s", "share of peak", "+ scan", "measured"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for size, timings in sizes.items():
        for (architecture, implementation), timing in timings.items():
            speeds = [size.tokens / seconds for seconds in timing.seconds().values()]
            share, with_scan = shares(size, architecture, timing, peak)
            at_most = "< " if timing.cold is None else ""
            table.add_row(
                f"{architecture} {size.rung.name} {implementation} {timing.setting}",
                f"{timing.parameters:,}",
                f"{at_most}{_with_quartiles(speeds)}",
                f"{at_most}{share:.1%}",
                f"{at_most}{with_scan:.1%}" if architecture == "mamba" else "",
                timing.basis(),
            )
        table.add_section()
    return table


def row_table(rows: Sequence[Measurement]) -> Table:
    """Figures, with the goals they were held against."""
    table = Table(title="figures and goals")
    for heading in ("figure", "value", "quartile range", "goal", "kept"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    ranges = {row.name: row.value for row in rows if row.name.endswith(", quartile range")}
    for row in rows:
        if row.name in ranges:
            continue
        between = ranges.get(f"{row.name}, quartile range")
        sign = "<=" if row.better == "lower" else ">="
        table.add_row(
            row.name,
            f"{row.value:,.4g} {row.unit}",
            "" if between is None else f"{between:.3g}",
            "" if row.bound is None else f"{sign} {row.bound:g}",
            {None: "", True: "yes", False: "NO"}[row.holds],
        )
    return table


def _with_quartiles(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):,.0f}"
    if len(values) < 2:
        return middle
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle} [{low:,.0f}, {high:,.0f}]"
