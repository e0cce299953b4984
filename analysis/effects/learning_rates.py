"""A search over learning rates: each cell's best rate, and how sensitive the loss is to it.

The sensitivity is that of Wortsman et al. 2309.14322, section 2.2. Ours: the refinement of the best
rate by a parabola, and the refusal to compare arms by the runs of a search.
"""

import math

import numpy as np
import pandas as pd

from analysis.tables.frames import columns_of, floats, groups, keep, means, strings, where
from analysis.tables.run_table import Table, final
from analysis.validity.refusal import Refusal

CELL = ["architecture", "rung", "corpus", "horizon_tokens"]
SEARCH = 3
"""Learning rates in one cell from which a sweep counts as a search over them."""
TRIAL_COLUMNS = [*CELL, "learning_rate", "loss_nats", "runs", "diverged", "uniform_nats"]
RUN_TRIAL_COLUMNS = [
    "run_id", "trunk_id", "search", "status", *CELL, "batch_tokens", "nominal_parameters", "seed",
    "order_seed", "learning_rate", "loss_nats", "uniform_nats",
]  # fmt: skip


def rate_search(table: Table) -> Refusal | None:
    """Why a search over learning rates cannot compare architectures; None if this sweep is none.

    The rates that the sweep plans count, so that a search is known as one from its first point.
    """
    counts = [len(np.unique(floats(cell, "learning_rate"))) for _, cell in groups(table.runs, CELL)]
    tried = max(len(table.rate_factors), *counts, 0)
    if tried < SEARCH:
        return None
    return Refusal(
        "R-TUNING",
        f"this sweep is a search that tries {tried} learning rates in each cell: a difference "
        "between its runs would mix the tuning with the architecture or the size",
        "give each architecture the rate found here and run a sweep at these rates",
    )


def trials(table: Table) -> pd.DataFrame:
    """One row per cell and learning rate that has ended, on the neutral set.

    A diverged trial has no loss. Seeds are averaged; a rate at which one seed diverged, diverged.
    """
    ended = keep(table.runs, table.runs["status"].isin(["done", "diverged"]))
    points = where(final(table).rows, "evaluation_set", table.neutral_set)
    losses = dict(zip(strings(points, "run_id"), floats(points, "loss_nats"), strict=True))
    records = []
    for key, runs in groups(ended, [*CELL, "learning_rate"]):
        diverged = bool((runs["status"] == "diverged").any())
        of_seeds = np.array([losses.get(run, np.nan) for run in strings(runs, "run_id")])
        if not diverged and not np.isfinite(of_seeds).all():
            continue
        loss = np.nan if diverged else float(of_seeds.mean())
        uniform = math.log(float(floats(runs, "vocab_size")[0]))
        records.append((*key, loss, len(runs), diverged, uniform))
    return pd.DataFrame(records, columns=pd.Index(TRIAL_COLUMNS))


def rate_trials(table: Table) -> pd.DataFrame:
    """One row per run of a search that has ended, on the neutral set, for a rule of rates.

    A diverged run has no loss.
    """
    ended = keep(table.runs, table.runs["status"].isin(["done", "diverged"]))
    points = where(final(table).rows, "evaluation_set", table.neutral_set)
    losses = dict(zip(strings(points, "run_id"), floats(points, "loss_nats"), strict=True))
    loss = np.array([losses.get(run, np.nan) for run in strings(ended, "run_id")])
    loss[strings(ended, "status") == "diverged"] = np.nan
    known = np.isfinite(loss) | (strings(ended, "status") == "diverged")
    uniform = np.log(floats(ended, "vocab_size"))
    rows = ended.assign(loss_nats=loss, uniform_nats=uniform, search=table.name)
    return columns_of(keep(rows, known), RUN_TRIAL_COLUMNS)


def search_table(table: Table) -> pd.DataFrame:
    """One row per cell of a search: best rate, whether it is bracketed, and the sensitivity.

    `factor` is the best rate over the rule's, which is the middle one of the tried rates unless
    the sweep lists its factors; `refined_log2` is where a parabola in log2 of the rate, through
    the best trial and its two neighbours, is lowest. `sensitivity_nats` follows Wortsman et al.
    2023: the mean over the tried rates of the loss, capped at that of a uniform guess, less the
    best loss. What needs every trial is empty until all have ended.
    """
    ended = trials(table)
    factors = table.rate_factors
    if not factors and len(ended):
        most = max(len(cell) for _, cell in groups(ended, CELL))
        # Only the place of the 1 counts: the middle.
        factors = tuple(2.0 ** (place - most // 2) for place in range(most))
    records = [
        {**dict(zip(CELL, key, strict=True)), **_searched(cell, factors)}
        for key, cell in groups(ended, CELL)
    ]
    return pd.DataFrame(records)


def _searched(cell: pd.DataFrame, factors: tuple[float, ...]) -> dict[str, object]:
    cell = cell.sort_values("learning_rate")
    rates, losses = floats(cell, "learning_rate"), floats(cell, "loss_nats")
    finite, complete = np.isfinite(losses), len(cell) == len(factors)
    record: dict[str, object] = {
        "trials": len(cell),
        "planned": len(factors),
        "diverged": int(floats(cell, "diverged").sum()),
        "best_loss_nats": np.nan,
        "best_rate": np.nan,
        "factor": np.nan,
        "optimum": "every trial diverged" if complete else "trials missing",
        "refined_log2": np.nan,
        "refined_factor": np.nan,
        "sensitivity_nats": np.nan,
    }
    if not finite.any():
        return record
    best = int(np.nanargmin(losses))
    record |= {"best_loss_nats": losses[best], "best_rate": rates[best]}
    if not complete:
        return record
    # Factors ascend like the rates, so any pair of them gives the rule's rate.
    rule = rates[0] / factors[0]
    # A diverged trial counts as a uniform guess, and so does one that ended above it.
    capped = np.minimum(np.where(finite, losses, np.inf), floats(cell, "uniform_nats"))
    interior = 0 < best < len(rates) - 1
    refined = _vertex(np.log2(rates), losses, best) if interior else np.nan
    return record | {
        "factor": rates[best] / rule,
        "optimum": "interior" if interior else "not bracketed",
        "refined_log2": refined,
        "refined_factor": 2.0**refined / rule,
        "sensitivity_nats": float(np.mean(capped - losses[best])),
    }


def _vertex(x: np.ndarray, y: np.ndarray, best: int) -> float:
    """Where the parabola through the best point and its neighbours is lowest."""
    near = slice(best - 1, best + 2)
    if not np.isfinite(y[near]).all():
        return math.nan
    curvature, slope, _ = np.polyfit(x[near] - x[best], y[near], 2)
    return float(x[best] - slope / (2 * curvature)) if curvature > 0 else math.nan


def edge(cell: pd.DataFrame, column: str) -> str:
    """`below` or `above` where the lowest loss is at an end of a column, else nothing."""
    losses = floats(cell, "loss_nats")
    if not np.isfinite(losses).any():
        return ""
    tried, best = floats(cell, column), floats(cell, column)[np.nanargmin(losses)]
    return "below" if best == tried.min() else "above" if best == tried.max() else ""


def one_sided(trials: pd.DataFrame) -> dict[str, str]:
    """Architectures whose best rate is at the same end of what was tried in every cell, by side.

    Their trials do not hold a best rate, and a rule fitted to them may take any value.
    """
    sides: dict[str, set[str]] = {}
    for key, cell in groups(trials, [*CELL, "batch_tokens"]):
        if len(np.unique(floats(cell, "learning_rate"))) > 1:
            sides.setdefault(str(key[0]), set()).add(edge(cell, "learning_rate"))
    return {name: min(seen) for name, seen in sides.items() if len(seen) == 1 and "" not in seen}


def rungs_of(trials: pd.DataFrame) -> list[str]:
    """The rungs of a search, from the smallest."""
    sizes = means(trials, ["rung"], ["nominal_parameters"]).sort_values("nominal_parameters")
    return [str(rung) for rung in sizes.index]
