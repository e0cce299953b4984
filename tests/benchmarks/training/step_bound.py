"""The least time of a training step, from rates of the same machine in the same minutes.

Products, attention and FFT are run one after another in the step's order, on the step's operands,
with nothing between: each counts with its best time at its place. What it finds in caches is what
the others leave there, as in a step, and no less. What each takes when it is repeated by itself,
its operands in caches and its output in memory that is there already, is shown beside that; no step
has it so. Scans and short convolutions count with the larger of their bytes over the speed of a
pass and their exponentials over that of torch.exp in cache. Passes count with bytes over the speed
of a pass, the optimizer with AdamW's bytes over that of main memory. Nothing is taken to overlap,
and no pass to hide behind a product: both cores are busy in either.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tests.benchmarks.training.step_trace import ADAM_WORDS, RUN, Call, StepTrace

REPLAYS = 2
"""Of the order, in a round."""
PASS_BYTES = tuple(4**i * 2**14 for i in range(8))
"""Sizes of a tensor, from 16 KiB to 256 MiB, at which a pass is clocked."""
_EXP_NUMBERS = 2**14
_FEWEST_CALLS, _MOST_CALLS, _SECONDS = 4, 100, 1e-2


@dataclass
class Rates:
    """What this machine does at best; later measurements only raise it.

    Attributes:
        passes: bytes per second of one tensor times another in place, by size of each. In place,
            because a fresh output would be read into the cache before it is written.
        exponentials: torch.exp a second, in cache, on all cores.
    """

    passes: dict[int, float]
    exponentials: float

    def pass_seconds(self, sizes: Mapping[int, int]) -> float:
        """Time to move tensors of these sizes in bytes, by count.

        Each is taken to move as fast as the fastest of its own size or a larger one did.
        """
        return sum(count * size / self._rate(size) for size, count in sizes.items())

    def memory_seconds(self, size: float) -> float:
        """Time to move so many bytes that no cache holds."""
        return size / self.passes[max(self.passes)]

    def raise_to(self, other: "Rates") -> None:
        """Keep the better of each."""
        self.passes = {size: max(rate, other.passes[size]) for size, rate in self.passes.items()}
        self.exponentials = max(self.exponentials, other.exponentials)

    def _rate(self, size: int) -> float:
        slower = [each for each in self.passes if each >= size]
        return max(self.passes[each] for each in slower or [max(self.passes)])


def measure_rates(sizes: tuple[int, ...] = PASS_BYTES) -> Rates:
    """Clock passes of tensors of these sizes in bytes, and exponentials."""
    passes = {}
    for size in sizes:
        a, b = (torch.ones(size // 4) for _ in range(2))
        passes[size] = 3 * size / best_seconds(partial(torch.mul, a, b, out=a))
    x, y = torch.linspace(-8.0, 0.0, _EXP_NUMBERS), torch.empty(_EXP_NUMBERS)
    # One core at a time: the start of threads would be clocked instead.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = _EXP_NUMBERS / best_seconds(lambda: torch.exp(x, out=y))
    torch.set_num_threads(threads)
    return Rates(passes, one * threads)


def best_seconds(run: Callable[[], object]) -> float:
    """The shortest of several times: on a busy machine most include a wait for a core."""
    run()
    best, spent, calls = math.inf, 0.0, 0
    while calls < _FEWEST_CALLS or (spent < _SECONDS and calls < _MOST_CALLS):
        seconds = _seconds_of(run)
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


def _seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Bound:
    """The least time of the step that a trace has seen; more rounds only lower it."""

    def __init__(self, trace: StepTrace) -> None:
        self.trace = trace
        self._run = {key: c for key, c in trace.calls.items() if c.group in RUN}
        self._alone = dict.fromkeys(self._run, math.inf)
        self._order = [(key, run) for key, run in trace.order if key in self._run]
        self._placed = [math.inf] * len(self._order)

    def measure(self) -> None:
        """Time all calls in their order, and each distinct one alone."""
        with torch.no_grad():
            for _ in range(REPLAYS):
                for place, (_, run) in enumerate(self._order):
                    self._placed[place] = min(self._placed[place], _seconds_of(run))
            for key, call in self._run.items():
                self._alone[key] = min(self._alone[key], best_seconds(call.run))

    def alone(self) -> dict[str, float]:
        """Seconds by group of what is run, each call repeated by itself."""
        calls = self._run.items()
        return {
            group: sum(c.count * self._alone[key] for key, c in calls if c.group == group)
            for group in RUN
        }

    def terms(self, rates: Rates, *, fused: bool) -> dict[str, float]:
        """Seconds by group.

        Args:
            fused: whether passes move the least they can, or what the program has them move.
        """
        passes: Counter[int] = self.trace.least() if fused else self.trace.written
        found = {group: self._seconds(group) for group in RUN}
        scans = [c for c in self.trace.calls.values() if c.group == "scans, convolutions"]
        found["scans, convolutions"] = sum(c.count * _scan_seconds(c, rates) for c in scans)
        found["passes"] = rates.pass_seconds(passes)
        moved = 4.0 * ADAM_WORDS * self.trace.optimizer_parameters
        found["optimizer"] = rates.memory_seconds(moved)
        return found

    def _seconds(self, group: str) -> float:
        pairs = zip(self._order, self._placed, strict=True)
        return sum(seconds for (key, _), seconds in pairs if self._run[key].group == group)


def _scan_seconds(call: Call, rates: Rates) -> float:
    moved = rates.pass_seconds(Counter(call.sizes))
    return max(moved, call.exponentials / rates.exponentials)
