"""How time and memory of each mixer grow with the length, held against what each must keep to.

python -m tests.bench_growth                     all mixers, 1k to 64k tokens
python -m tests.bench_growth mamba2 scout        some of them
python -m tests.bench_growth --quick             short lengths; for tests

Each point is a process of its own with one thread and a limit on its memory: a mixer of width 64,
forward and backward on one sequence of one document. Time is the process's CPU time, which other
processes on the machine lengthen much less than they do the time on the wall; it is taken in two
processes with all other points between them, a few times in each, and the fastest counts. Memory is
the peak of the resident set above what it was before. glibc asks the system anew for each tensor
over 32 MB, whose pages are then filled one by one: steps are half as slow again from some length
on. So memory is that of a first pass, and time that of passes which keep what they had. A mixer's
line ends with the first point that takes too long or too much. Writes reports/growth.json, .csv,
.png and .svg. An exponent above its bound fails the command.
"""

import argparse
import ctypes
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import psutil
import torch
from rich.console import Console
from rich.table import Table

from analysis.growth_figure import SHORTEST, draw, exponents
from kernels.runtime import warm
from launch.measurements import Measurement, write_measurements
from models.backbone import initialise
from models.mixer import MixerConfig, Pattern, Slot, mixer_class, mixer_kinds
from models.sequence import WholeSequence

ROOT = Path(__file__).parent.parent
D_MODEL = 64
FIELDS: Mapping[str, Mapping[str, object]] = {
    "attention": {"n_heads": 2},
    "window": {"n_heads": 2, "window": 256},
    "scout": {"n_heads": 2, "every": 10},
    "hip": {"n_heads": 2, "k": 128, "window": 64},
    "mamba": {},
    "mamba2": {"d_state": 32, "head_dim": 32},
    "gated_recurrence": {"n_heads": 2},
    "hybrid": {"n_heads": 2, "window": 256},
    "performer": {"n_heads": 2},
    "abc": {"n_heads": 2},
    "monarch": {"filter_hidden": 16, "max_len": 65_536},
    "s4d": {},
    "hydra": {"d_state": 32, "head_dim": 32},
}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt (malloc.h)."""
LINEAR, CONVOLUTION = 1.1, 1.2
CONVOLUTIONS = ("monarch", "s4d")
COUNTED = {"attention": 0.0, "scout": 0.1, "hip": 0.1}
"""Mixers bounded by the growth of what they count as their work, and by how much more."""
SHORT, LONG = 1024, 65_536
QUICK_LENGTHS = (128, 256)
POINT_CPU_SECONDS, POINT_WALL_SECONDS = 120, 900.0
POINT_BYTES = 6 << 30
ROUNDS = 2
"""What slows the machine down for a while should not reach a point in each."""
REPEAT_SECONDS, REPEATS = 0.5, 5
SETTLE_SECONDS, FEW_FAULTS = 10.0, 100
LEAST_SECONDS = 0.2
"""Clocked together: the clock of CPU time may tick every 4 ms."""


@dataclass(frozen=True)
class Point:
    """A mixer at a length."""

    mixer: str
    length: int


def config_of(kind: str) -> MixerConfig:
    """The small mixer of a kind."""
    return mixer_kinds()[kind](**FIELDS[kind])


def slot_of(kind: str) -> Slot:
    """Causal where the mixer can be."""
    causal = Pattern.CAUSAL_SELF in mixer_class(kind).patterns
    return Slot(D_MODEL, 2, Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF)


def serve_point(connection: Connection, point: Point) -> None:
    """Send seconds and bytes of a point, or why there are none."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    mixer = config_of(point.mixer).build(slot_of(point.mixer))
    initialise(mixer, 0)  # pyright: ignore[reportArgumentType]
    _train_once(mixer, 256)
    resource.setrlimit(resource.RLIMIT_CPU, (POINT_CPU_SECONDS, POINT_CPU_SECONDS + 5))
    room = psutil.Process().memory_info().vms + POINT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    try:
        connection.send(_measure(mixer, point.length))
    except (RuntimeError, MemoryError) as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


def _measure(mixer: torch.nn.Module, length: int) -> tuple[float, int]:
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    _train_once(mixer, length)
    peak = _peak_bytes() - before
    _keep_memory()
    _settle(mixer, length)
    times = [_train_for_a_while(mixer, length)]
    while sum(times) < REPEAT_SECONDS and len(times) < REPEATS:
        times.append(_train_for_a_while(mixer, length))
    return min(times), max(peak, 1)


def _settle(mixer: torch.nn.Module, length: int) -> None:
    """Pass until the heap has room for all that a pass needs, or this has taken long enough.

    A page that is new to the process is cleared first; how many are is the allocator's business.
    """
    seconds, faults = 0.0, FEW_FAULTS
    while faults >= FEW_FAULTS and seconds < SETTLE_SECONDS:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds += _train_once(mixer, length)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _train_for_a_while(mixer: torch.nn.Module, length: int) -> float:
    """CPU seconds of a pass, the mean of as many as the clock needs to tell them apart."""
    times = [_train_once(mixer, length)]
    while sum(times) < LEAST_SECONDS:
        times.append(_train_once(mixer, length))
    return sum(times) / len(times)


def _keep_memory() -> None:
    """Let nothing that is freed from now on go back to the system."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_MAX, 0)
    assert libc.mallopt(M_TRIM_THRESHOLD, -1)


def _train_once(mixer: torch.nn.Module, length: int) -> float:
    """CPU seconds of one pass forward and one back; inputs and gradients of weights are freed."""
    x = torch.randn(1, length, D_MODEL, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    sequence = WholeSequence(torch.zeros(1, length, dtype=torch.int32))
    begin = time.process_time()
    mixer(x, sequence).sum().backward()
    seconds = time.process_time() - begin
    mixer.zero_grad(set_to_none=True)
    return seconds


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def take(point: Point) -> tuple[float, int] | str:
    """Seconds and bytes of a point, or why there are none."""
    # Forked from a process that has loaded everything and computed nothing.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve_point, args=(sender, point), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(POINT_WALL_SECONDS):
            return f"over {POINT_WALL_SECONDS:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
            raise RuntimeError(
                f"{point} ended with exit code {process.exitcode}; its error stands above"
            ) from None
        return f"over {POINT_CPU_SECONDS} s of CPU time, or killed for memory"
    finally:
        process.kill()
        process.join()


def bound(kind: str, lengths: Sequence[int]) -> float:
    """The exponent of time that a mixer must keep to, over these lengths."""
    if kind not in COUNTED:
        return CONVOLUTION if kind in CONVOLUTIONS else LINEAR
    if kind == "attention":
        return 2.0
    mixer = config_of(kind).build(slot_of(kind))
    dense = sum(p.numel() for p in mixer.parameters())
    work = [2 * dense * n + mixer.mix_flops(n, n).needed for n in lengths]
    rows = pd.DataFrame({"mixer": kind, "length": lengths, "seconds": work, "bytes": work})
    return float(exponents(rows)["seconds"].iloc[0]) + COUNTED[kind]


def measure(kinds: Sequence[str], lengths: Sequence[int], target: str, root: Path) -> bool:
    """Measure, write the report and show it; tells whether every bound was kept."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    begin, load = time.monotonic(), os.getloadavg()[0]
    warm()
    rows, ends = _take_all(kinds, lengths, console)
    points = pd.DataFrame(rows)
    (root / "reports").mkdir(parents=True, exist_ok=True)
    draw(points, target).save(root / "reports")
    slopes = exponents(points)
    measured = [*_exponent_rows(points, slopes), *_end_rows(ends)]
    measured.append(Measurement("load average at the start", load, ""))
    measured.append(Measurement("benchmark", time.monotonic() - begin, "s"))
    path = write_measurements(target, measured, root)
    console.print(_table(slopes, {row.name: row for row in measured}))
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
            said = f"round {round_ + 1} of {ROUNDS}: {point.mixer} {point.length}: {answer}"
            console.print(said, highlight=False)
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


def _exponent_rows(points: pd.DataFrame, slopes: pd.DataFrame) -> Iterator[Measurement]:
    for row in slopes.to_dict("records"):
        kind = row["mixer"]
        seen = points[(points["mixer"] == kind) & (points["length"] >= SHORTEST)]["length"]
        yield Measurement(
            f"{kind}: exponent of time", row["seconds"], "", bound(kind, seen.tolist())
        )
        yield Measurement(f"{kind}: exponent of memory", row["bytes"], "", LINEAR)
        for column, said in (("seconds_error", "time"), ("bytes_error", "memory")):
            if not math.isnan(row[column]):
                yield Measurement(
                    f"{kind}: standard error of the exponent of {said}", row[column], ""
                )
    for row in points.to_dict("records"):
        name = f"{row['mixer']} at {row['length']} tokens"
        yield Measurement(f"{name}: time", row["seconds"], "s")
        yield Measurement(f"{name}: memory", row["bytes"], "bytes")


def _end_rows(ends: Mapping[str, tuple[int, str]]) -> Iterator[Measurement]:
    for kind, (length, reason) in ends.items():
        yield Measurement(f"{kind}: not measured from here on: {reason}", length, "tokens")


def _table(slopes: pd.DataFrame, measured: Mapping[str, Measurement]) -> Table:
    table = Table(title=f"exponents from {SHORTEST:,} tokens on; standard errors of the line's fit")
    for heading in ("mixer", "up to", "time", "bound", "memory", "bound", "kept"):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    for row in slopes.to_dict("records"):
        kinds = [measured[f"{row['mixer']}: exponent of {what}"] for what in ("time", "memory")]
        kept = all(each.holds for each in kinds)
        table.add_row(
            str(row["mixer"]),
            f"{row['longest']:,}",
            f"{row['seconds']:.2f} +- {row['seconds_error']:.2f}",
            f"{kinds[0].bound:.2f}",
            f"{row['bytes']:.2f} +- {row['bytes_error']:.2f}",
            f"{kinds[1].bound:.2f}",
            "yes" if kept else "NO",
        )
    return table


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench_growth")
    parser.add_argument("mixers", nargs="*", help=f"of {', '.join(FIELDS)}; all if none is named")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    parser.add_argument("--longest", type=int, default=LONG, help="last length, in tokens")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    asked = parser.parse_args(words)
    mixer_kinds()
    unknown = sorted(set(asked.mixers) - set(FIELDS))
    if unknown:
        parser.error(f"unknown mixers {', '.join(unknown)}; choose from {', '.join(FIELDS)}")
    kinds = asked.mixers or list(FIELDS)
    if asked.quick:
        return 0 if measure(kinds, QUICK_LENGTHS, "growth_quick", asked.root) else 1
    lengths = [SHORT << i for i in range(32) if SHORT << i <= asked.longest]
    return 0 if measure(kinds, lengths, "growth", asked.root) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
