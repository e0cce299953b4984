"""The progress display of a sweep: each active run, the total, and the time left."""

import time
from collections.abc import Callable
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


def trained_tokens(plan: Plan, unit: Unit, sweep: Path) -> int:
    """Tokens of a unit that are trained, in this command and before it; its trunk counts once."""

    def step(folder: str) -> int:
        return int(read_status(inside(sweep, folder)).get("step", 0))

    batch = unit.branches[0].run.optimizer.batch_tokens
    done = 0
    if unit.trunk is not None:
        done += min(step(unit.trunk.trunk_id), max(unit.forks)) * batch
    for planned in plan.runs:
        if planned.unit is unit:
            start = planned.experiment.run.budget.tokens - planned.new_tokens
            done += max(0, step(planned.experiment.folder_name) * batch - start)
    return done


class Progress:
    """A live table on a terminal; elsewhere, such as in a log file, a line every 15 seconds."""

    def __init__(self, plan: Plan, sweep: Path, todo: list[Unit], console: Console) -> None:
        self._plan, self._sweep, self._todo, self._console = plan, sweep, todo, console
        self._begin = time.monotonic()
        self._before = {unit.name: trained_tokens(plan, unit, sweep) for unit in todo}
        self._total = sum(unit.tokens for unit in todo)
        self._spoke = self._begin
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Callable[[], None]:
        if self._console.is_terminal:
            self._live.start()
        return self.tick

    def __exit__(self, *exc_info: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def tick(self) -> None:
        """Update the display."""
        trained = self._trained()
        if self._live.is_started:
            self._live.update(Group(self._running_table(), self._overall(trained)))
        elif time.monotonic() - self._spoke > LINE_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(self._line(trained), highlight=False)

    def _trained(self) -> int:
        """Tokens trained so far, each trunk counted once."""
        return sum(trained_tokens(self._plan, unit, self._sweep) for unit in self._todo)

    def _status(self, folder: str) -> dict:
        return read_status(inside(self._sweep, folder))

    def _seconds_left(self, trained: int) -> float | None:
        new = trained - sum(self._before.values())
        elapsed = time.monotonic() - self._begin
        if new <= 0 or elapsed < 5:
            return None
        # Tokens of larger models take longer: weigh what is left by the plan's estimates.
        done = left = 0.0
        for unit in self._todo:
            weight = self._plan.seconds[unit.name] / max(unit.tokens, 1)
            now = trained_tokens(self._plan, unit, self._sweep)
            done += weight * (now - self._before[unit.name])
            left += weight * (unit.tokens - now)
        return elapsed * max(left, 0) / max(done, 1e-9)

    def _line(self, trained: int) -> str:
        left = self._seconds_left(trained)
        running = [f"{name} {self._brief(status)}" for name, status in self._active()]
        return (
            f"{trained / 1e6:.2f} of {self._total / 1e6:.2f} M tokens, "
            f"{duration(time.monotonic() - self._begin)} elapsed, "
            f"{'time left unknown' if left is None else duration(left) + ' left'}"
            + (f" | {'; '.join(running)}" if running else "")
        )

    def _overall(self, trained: int) -> Table:
        left = self._seconds_left(trained)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text("total", style="bold"),
            ProgressBar(total=self._total, completed=trained, width=40),
            f"{trained / 1e6:.2f}/{self._total / 1e6:.2f} M tokens",
            f"{duration(time.monotonic() - self._begin)} elapsed",
            "" if left is None else f"{duration(left)} left",
        )
        return grid

    def _running_table(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        for name, status in self._active():
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

    def _active(self) -> list[tuple[str, dict]]:
        active = []
        for unit in self._todo:
            runs = [unit.trunk] if unit.trunk is not None else []
            for experiment in [*runs, *unit.branches]:
                is_trunk = experiment is unit.trunk
                folder = experiment.trunk_id if is_trunk else experiment.folder_name
                status = self._status(folder)
                if status.get("state") == "running":
                    active.append((_title(experiment, is_trunk), status))
        return active


def _title(experiment: Experiment, is_trunk: bool) -> str:
    run = experiment.run
    what = "trunk" if is_trunk else f"{run.budget.tokens / 1e6:.2f} M"
    return f"{run.architecture} {run.corpus.name} {run.rung} {what}"
