"""The progress display of a sweep: each active run, the total, and the time left."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.job import Unit
from launch.plan import Plan, duration
from sweeps.grammar import Experiment
from trainer.record import read_status
from untrusted.paths import inside

LINE_SECONDS = 15.0
LOOK_SECONDS = 1.0
"""Between looks at the runs' states: at many runs each costs time that training could have."""
OVER = ("done", "extended")
"""States of a run that is not being trained; an extended trunk may be extended further."""


@dataclass(frozen=True)
class Stretch:
    """Training that a sweep counts once: a trunk to its last fork, or a branch from its fork on.

    Attributes:
        first_token: of the run, from which on its tokens count here.
        tokens: how many count.
    """

    title: str
    folder: Path
    batch_tokens: int
    first_token: int
    tokens: int

    def trained(self, status: dict) -> int:
        """Tokens of it that are trained, by the status of its run."""
        reached = int(status.get("step", 0)) * self.batch_tokens
        return min(max(0, reached - self.first_token), self.tokens)


def stretches(plan: Plan, sweep: Path) -> dict[str, tuple[Stretch, ...]]:
    """The stretches of every unit of a plan, by the unit's name."""
    found: dict[str, list[Stretch]] = {}
    for unit in plan.units:
        found[unit.name] = []
        if unit.trunk is not None:
            batch = unit.trunk.run.optimizer.batch_tokens
            folder = inside(sweep, unit.trunk.trunk_id)
            title = _title(unit.trunk, "trunk")
            found[unit.name].append(Stretch(title, folder, batch, 0, max(unit.forks) * batch))
    for planned in plan.runs:
        run, new = planned.experiment.run, planned.new_tokens
        folder = inside(sweep, planned.experiment.folder_name)
        title = _title(planned.experiment, f"{run.budget.tokens / 1e6:.2f} M")
        batch, first = run.optimizer.batch_tokens, run.budget.tokens - new
        found[planned.unit.name].append(Stretch(title, folder, batch, first, new))
    return {name: tuple(mine) for name, mine in found.items()}


def trained_tokens(mine: Sequence[Stretch]) -> int:
    """Tokens that are trained, in this command and before it; a trunk counts once."""
    return sum(each.trained(read_status(each.folder)) for each in mine)


class Progress:
    """A live table on a terminal; elsewhere, such as in a log file, a line every 15 seconds."""

    def __init__(self, plan: Plan, sweep: Path, todo: list[Unit], console: Console) -> None:
        known = stretches(plan, sweep)
        self._todo = {unit.name: known[unit.name] for unit in todo}
        self._seconds = {unit.name: plan.seconds[unit.name] / max(unit.tokens, 1) for unit in todo}
        self._total = {unit.name: unit.tokens for unit in todo}
        self._console = console
        self._ended: dict[Path, dict] = {}
        self._begin = self._spoke = time.monotonic()
        self._looked = -math.inf
        self._before = self._trained(self._statuses())
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Callable[[], None]:
        if self._console.is_terminal:
            self._live.start()
        return self.tick

    def __exit__(self, *exc_info: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def tick(self) -> None:
        """Update the display, where it is time to."""
        now = time.monotonic()
        if self._live.is_started:
            if now - self._looked > LOOK_SECONDS:
                self._looked = now
                seen = self._statuses()
                self._live.update(Group(self._running_table(seen), self._overall(seen)))
        elif now - self._spoke > LINE_SECONDS:
            self._spoke = now
            self._console.print(self._line(self._statuses()), highlight=False)

    def _statuses(self) -> dict[Path, dict]:
        """The status of every run; that of one with nothing left to train is read once."""
        found = {}
        for each in chain.from_iterable(self._todo.values()):
            status = self._ended.get(each.folder) or read_status(each.folder)
            found[each.folder] = status
            if status.get("state") in OVER and each.trained(status) == each.tokens:
                self._ended[each.folder] = status
        return found

    def _trained(self, seen: dict[Path, dict]) -> dict[str, int]:
        """Tokens trained so far of each unit, its trunk counted once."""
        return {
            name: sum(each.trained(seen[each.folder]) for each in mine)
            for name, mine in self._todo.items()
        }

    def _seconds_left(self, trained: dict[str, int]) -> float | None:
        elapsed = time.monotonic() - self._begin
        if sum(trained.values()) <= sum(self._before.values()) or elapsed < 5:
            return None
        # Tokens of larger models take longer: weigh what is left by the plan's estimates.
        done = left = 0.0
        for name, weight in self._seconds.items():
            done += weight * (trained[name] - self._before[name])
            left += weight * (self._total[name] - trained[name])
        return elapsed * max(left, 0) / max(done, 1e-9)

    def _line(self, seen: dict[Path, dict]) -> str:
        trained = self._trained(seen)
        left = self._seconds_left(trained)
        running = [f"{name} {self._brief(status)}" for name, status in self._active(seen)]
        return (
            f"{sum(trained.values()) / 1e6:.2f} of {sum(self._total.values()) / 1e6:.2f} M tokens, "
            f"{duration(time.monotonic() - self._begin)} elapsed, "
            f"{'time left unknown' if left is None else duration(left) + ' left'}"
            + (f" | {'; '.join(running)}" if running else "")
        )

    def _overall(self, seen: dict[Path, dict]) -> Table:
        trained = self._trained(seen)
        left = self._seconds_left(trained)
        done, total = sum(trained.values()), sum(self._total.values())
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text("total", style="bold"),
            ProgressBar(total=total, completed=done, width=40),
            f"{done / 1e6:.2f}/{total / 1e6:.2f} M tokens",
            f"{duration(time.monotonic() - self._begin)} elapsed",
            "" if left is None else f"{duration(left)} left",
        )
        return grid

    def _running_table(self, seen: dict[Path, dict]) -> Table:
        grid = Table.grid(padding=(0, 1))
        for name, status in self._active(seen):
            step, steps = int(status.get("step", 0)), max(int(status.get("steps", 1)), 1)
            grid.add_row(
                name, ProgressBar(total=steps, completed=step, width=20), *self._cells(status)
            )
        return grid

    def _cells(self, status: dict) -> list[str]:
        rate = float(status.get("tokens_per_second") or 0)
        loss = status.get("loss_nats")
        return [
            f"step {status.get('step', 0)}/{status.get('steps', '?')}",
            "" if loss is None else f"loss {float(loss):.3f}",
            f"{rate / 1e3:.0f} k tokens/s" if rate else "",
        ]

    def _brief(self, status: dict) -> str:
        return " ".join(cell for cell in self._cells(status) if cell)

    def _active(self, seen: dict[Path, dict]) -> list[tuple[str, dict]]:
        return [
            (each.title, seen[each.folder])
            for each in chain.from_iterable(self._todo.values())
            if seen[each.folder].get("state") == "running"
        ]


def _title(experiment: Experiment, what: str) -> str:
    run = experiment.run
    return f"{run.architecture} {run.corpus.name} {run.rung} {what}"
