"""Tables and sentences for a search over learning rates."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.effects.learning_rates import CELL, search_table
from analysis.tables.frames import columns_of, floats, groups, strings
from analysis.tables.run_table import Table, has_evidence
from analysis.words.numbers import with_unit


def cells_of(search: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The trials of each panel: a rung, named with its corpus where there are several."""
    several = len(set(search["corpus"])) > 1
    horizons = len(set(search["horizon_tokens"])) > len(set(search["rung"]))
    for (rung, corpus, horizon), rows in groups(search, CELL[1:]):
        name = f"{rung} on {corpus}" if several else str(rung)
        yield f"{name}, {with_unit(horizon)} tokens" if horizons else name, rows


def search_shown(search: pd.DataFrame) -> pd.DataFrame:
    """The table of a search as a reader sees it."""
    if not len(search):
        return search
    shown = columns_of(search, ["architecture", "rung"]).copy()
    if len(set(search["corpus"])) > 1:
        shown["corpus"] = search["corpus"]
    shown["trials"] = [
        f"{done:.0f} of {planned:.0f}"
        for done, planned in zip(floats(search, "trials"), floats(search, "planned"), strict=True)
    ]
    shown["diverged"] = search["diverged"].astype(str)
    shown["best loss"] = _written(search, "best_loss_nats", "{:.4f}")
    shown["best rate"] = _written(search, "best_rate", "{:.3g}")
    shown["factor on the rung's rate"] = _written(search, "factor", "{:.3g}")
    shown["optimum"] = search["optimum"]
    shown["refined optimum, log2 of the rate"] = _written(search, "refined_log2", "{:.2f}")
    shown["refined factor"] = _written(search, "refined_factor", "{:.2f}")
    shown["sensitivity [nats]"] = _written(search, "sensitivity_nats", "{:.3f}")
    return shown


def search_lines(table: Table) -> list[str]:
    """The results of a search for a terminal: a line per architecture, then what is open."""
    search = search_table(table)
    if not len(search):
        return ["Learning rates: no trial has finished yet."]
    lines = ["Best learning rate by rung, as a factor on the rung's own rate:"]
    for (name,), cells in groups(search, ["architecture"]):
        lines.append(f"  {name}: {', '.join(_cell_words(row) for row in cells.to_dict('records'))}")
    return [*lines, equal_trials(search)]


def equal_trials(search: pd.DataFrame) -> str:
    """Whether every arm had the same number of trials."""
    counts = floats(search, "trials")
    low, high = int(counts.min()), int(counts.max())
    open_cells = int(np.sum(strings(search, "optimum") == "not bracketed"))
    tail = f" {open_cells} of {len(search)} optima are at the edge of the tried rates."
    if low == high:
        return f"Equal tuning: {low} trials in each cell of every arm.{tail}"
    return f"Unequal tuning so far: {low} to {high} trials per cell.{tail}"


def tuning_table(tuning: dict) -> pd.DataFrame:
    """Each architecture's learning rate scale and the evidence for it."""
    records = [
        {
            "architecture": name,
            "learning rate scale": f"{float(entry.get('learning_rate_scale', 1.0)):g}",
            "evidence": str(entry["evidence"]) if has_evidence(entry) else "none stated",
        }
        for name, entry in tuning.items()
    ]
    return pd.DataFrame(records)


def tuning_sentence(tuning: dict) -> str:
    """Whether all arms are equally tuned; a warning where only some are."""
    bare = [name for name, entry in tuning.items() if not has_evidence(entry)]
    scales = {float(entry.get("learning_rate_scale", 1.0)) for entry in tuning.values()}
    if not tuning:
        return ""
    if not bare:
        return "Every arm's learning rate scale rests on stated evidence."
    if len(bare) < len(tuning):
        return (
            f"Warning: tuning is unequal. No evidence is stated for {', '.join(bare)}, but it is "
            "for the other arms: a difference between them may be one of tuning."
        )
    if len(scales) > 1:
        return (
            "Warning: the arms differ in their learning rate scale, and no evidence is stated for "
            "any of them: a difference between them may be one of tuning."
        )
    return (
        "No arm was tuned by itself: all run at the rung's rate, and no evidence is stated. An arm "
        "whose best rate lies elsewhere is at a disadvantage."
    )


def _written(search: pd.DataFrame, column: str, form: str) -> list[str]:
    return [form.format(value) if np.isfinite(value) else "" for value in floats(search, column)]


def _cell_words(row: dict) -> str:
    if not np.isfinite(row["factor"]):
        return f"{row['rung']} {row['optimum']}"
    note = "" if row["optimum"] == "interior" else f" ({row['optimum']})"
    return f"{row['rung']} {row['factor']:.3g}{note}"
