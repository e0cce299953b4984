"""The least time of a training step, from rates of the same machine in the same minutes.

Products, attention and FFT count with the best time that each takes alone at its own shapes, into
memory that is there already. Scans and short convolutions count with the larger of their bytes over
the speed of a pass and their exponentials over that of torch.exp in cache. Passes count with bytes
over the speed of a pass, the optimizer with AdamW's bytes over that of main memory. Nothing is
taken to overlap, and no pass to hide behind a product: both cores are busy in either.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tests.step_trace import ADAM_WORDS, Call, StepTrace

ALONE = ("products", "attention kernel", "FFT")
"""Groups whose calls are timed alone."""
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
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


class Bound:
    """The least time of the step that a trace has seen; more rounds only lower it."""

    def __init__(self, trace: StepTrace) -> None:
        self.trace = trace
        self._alone = {key: c for key, c in trace.calls.items() if c.group in ALONE}
        self._best = dict.fromkeys(self._alone, math.inf)

    def measure(self) -> None:
        """Time each distinct call alone."""
        with torch.no_grad():
            for key, call in self._alone.items():
                self._best[key] = min(self._best[key], best_seconds(call.run))

    def products(self) -> list[tuple[Call, float]]:
        """Distinct products, and the best time of one, in seconds; those that take most first."""
        pairs = [(c, self._best[k]) for k, c in self._alone.items() if c.group == "products"]
        return sorted(pairs, key=lambda pair: -pair[0].count * pair[1])

    def terms(self, rates: Rates, *, fused: bool) -> dict[str, float]:
        """Seconds by group.

        Args:
            fused: whether passes move the least they can, or what the program has them move.
        """
        passes: Counter[int] = self.trace.least() if fused else self.trace.written
        found = {group: self._seconds(group) for group in ALONE}
        scans = [c for c in self.trace.calls.values() if c.group == "scans, convolutions"]
        found["scans, convolutions"] = sum(c.count * _scan_seconds(c, rates) for c in scans)
        found["passes"] = rates.pass_seconds(passes)
        moved = 4.0 * ADAM_WORDS * self.trace.optimizer_parameters
        found["optimizer"] = rates.memory_seconds(moved)
        return found

    def _seconds(self, group: str) -> float:
        calls = self._alone.items()
        return sum(c.count * self._best[key] for key, c in calls if c.group == group)


def _scan_seconds(call: Call, rates: Rates) -> float:
    moved = rates.pass_seconds(Counter(call.sizes))
    return max(moved, call.exponentials / rates.exponentials)
