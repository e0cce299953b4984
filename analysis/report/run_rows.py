"""The table of every run: what each cell shows, and what a script sorts it by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from analysis.report.sparkline import curve_words, loss_scale, sparkline
from analysis.tables.frames import floats, where
from analysis.tables.quarantine import DAMAGED
from analysis.tables.run_table import Table, final
from analysis.words.numbers import seeds_text, with_unit

HEADS = {
    "architecture": False, "corpus": False, "rung": True, "parameters": True,
    "tokens": True, "seed": True, "learning rate": True, "final loss": True, "state": False,
    "time": True,
}  # fmt: skip
"""Heads of the columns between a run's folder and its curve, and whether they sort by numbers."""
FAULTS = ("diverged", "failed", DAMAGED, "other-data")


@dataclass(frozen=True)
class Cell:
    """What a cell shows and what it is sorted by; an empty key is unknown and comes last."""

    text: str
    key: str
    style: str = ""


@dataclass(frozen=True)
class RunRow:
    """One run: its id, a cell per head, and its training curve with what it shows in words."""

    run_id: str
    cells: tuple[Cell, ...]
    curve: Markup
    curve_words: str


def run_rows(table: Table) -> list[RunRow]:
    """A row for every run of the sweep, whatever its state."""
    losses, scale = _final_losses(table), loss_scale(table.training)
    rows = []
    for record in table.runs.to_dict("records"):
        run_id = str(record["run_id"])
        curve = where(table.training, "run_id", run_id)
        cells = (
            _words(record["architecture"]),
            _words(record["corpus"]),
            Cell(_text(record["rung"]), _key(record["parameters"])),
            _number(record["parameters"], with_unit),
            _number(record["tokens"], with_unit),
            _seeds(record["seed"], record["order_seed"]),
            _number(record["learning_rate"], lambda rate: f"{rate:.3g}"),
            _number(losses.get(run_id), lambda loss: f"{loss:.4f}"),
            _words(record["status"], "bad" if record["status"] in FAULTS else ""),
            _number(record["training_seconds"], _duration),
        )
        rows.append(RunRow(run_id, cells, sparkline(curve, scale), curve_words(curve)))
    return rows


def example_run(table: Table) -> str:
    """The folder of a finished run, for a command that a reader can try; empty without one."""
    done = where(table.runs, "status", "done")
    return f"{table.folder}/{done['run_id'].iloc[0]}" if len(done) else ""


def _final_losses(table: Table) -> dict[str, float]:
    """Loss on the neutral set after the decay of the learning rate, by run."""
    rows = where(final(table).rows, "evaluation_set", table.neutral_set)
    return dict(zip(rows["run_id"].astype(str), floats(rows, "loss_nats"), strict=True))


def _number(value: object, form: Callable[[float], str]) -> Cell:
    key = _key(value)
    return Cell(form(float(key)) if key else "", key, "n")


def _seeds(seed: object, order_seed: object) -> Cell:
    """Sorted by the seed of the weights, then by that of the order."""
    if not _key(seed) or not _key(order_seed):
        return Cell(_text(seed), _key(seed), "n")
    weights, order = int(float(_key(seed))), int(float(_key(order_seed)))
    return Cell(seeds_text(weights, order), _key(weights + order / 2**31), "n")


def _words(value: object, style: str = "") -> Cell:
    return Cell(_text(value), _text(value), style)


def _key(value: object) -> str:
    """A number that a script can read, or nothing where it is unknown."""
    if isinstance(value, int | float | np.number) and math.isfinite(float(value)):
        return f"{float(value):.10g}"
    return ""


def _text(value: object) -> str:
    unknown = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if unknown else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
