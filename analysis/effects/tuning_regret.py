"""What a rule of rates costs: regret at rungs that its fit did not see, and by sharing a trunk.

Ours. The loss at a rate is read from valleys through the rung's own trials, not from its lowest
trial, which is low by selection. A regret is positive even where rule and optimum agree, as noise
moves the optimum: replicates measure this bias, and it is subtracted.
"""

import numpy as np
import pandas as pd

from analysis.effects.tuning_rule import (
    CELL,
    SHARED_TRUNKS,
    Own,
    fit_rules,
    fitted_trials,
    own_optima,
)
from analysis.fitting.valleys import rise
from analysis.tables.frames import columns_of, floats, groups, keep, means, strings

QUANTILES = (0.025, 0.975)
REGRET_COLUMNS = [
    *CELL, "rule_rate", "own_rate", "percent", "low", "high", "fitted_percent", "optimism_percent",
]  # fmt: skip


def regrets(trials: pd.DataFrame, rung: str, noise: float, seed: int) -> pd.DataFrame:
    """One row per cell of a rung: what the rule of the other rungs leaves on the table.

    `percent`, `low` and `high` are the loss at the rule's rate over the loss at the cell's own
    best rate, corrected for the bias of `fitted_percent`. `optimism_percent` is how far the lowest
    of the cell's noisy trials is expected to lie below the true loss of its rate.

    Raises:
        ValueError: the other rungs do not determine a rule.
    """
    here = strings(trials, "rung") == rung
    if not here.any():
        known = ", ".join(dict.fromkeys(strings(trials, "rung").tolist()))
        raise ValueError(f"no trial of rung {rung!r}; there are {known}")
    rules = fit_rules(keep(trials, ~here), noise, seed)
    rows = fitted_trials(
        keep(trials, np.isin(strings(trials, "architecture"), rules.architectures))
    )
    # Valleys have the shape of all rungs: few trials of one rung would leave it open.
    every = own_optima(rows, noise, seed)
    own = _of(every, np.flatnonzero(strings(every.cells, "rung") == rung))
    away = rules.log2_rate(own.cells) - floats(own.cells, "log2_rate")
    found = _excess(own, away, rules.log2_rate(own.cells) - own.centres)
    optimism = [_optimism(rows, own, place, noise) for place in range(len(own.cells))]
    return columns_of(
        own.cells.assign(
            rule_rate=2.0 ** rules.log2_rate(own.cells),
            own_rate=2.0 ** floats(own.cells, "log2_rate"),
            optimism_percent=optimism,
            **found,
        ),
        REGRET_COLUMNS,
    )


def sharing_costs(trials: pd.DataFrame, noise: float, seed: int) -> pd.DataFrame:
    """One row per cell of a trunk that several horizons share: loss at one rate, over its own best.

    The shared rate is the one with the lowest mean ln of the loss over its horizons.
    """
    own = own_optima(fitted_trials(trials), noise, seed)
    parts = []
    for _, cells in groups(own.cells.assign(place=np.arange(len(own.cells))), SHARED_TRUNKS):
        if len(cells) < 2:
            continue
        mine = floats(cells, "place").astype(int)
        shapes, centres = own.shapes[mine], floats(cells, "log2_rate")
        grid = np.linspace(centres.min(), centres.max(), 201)
        cost = rise(shapes[:, None], grid - centres[:, None]).mean(axis=0)
        shared = float(grid[cost.argmin()])
        part = _of(own, mine)
        found = _excess(part, shared - centres, shared - part.centres)
        parts.append(cells.assign(shared_rate=2.0**shared, own_rate=2.0**centres, **found))
    names = [*CELL, "shared_rate", "own_rate", "percent", "low", "high", "fitted_percent"]
    if not parts:
        return pd.DataFrame(columns=pd.Index(names))
    return columns_of(pd.concat(parts, ignore_index=True), names)


def summary(costs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means over cells; their intervals are averaged, as cells of one rung share errors."""
    found = means(costs, by, ["percent", "low", "high"])
    largest = costs.groupby(by, sort=False)["percent"].max()
    return found.assign(largest=largest).reset_index()


def _of(own: Own, mine: np.ndarray) -> Own:
    return Own(
        own.cells.iloc[mine], own.centres[:, mine], own.shapes[mine], own.shape_draws[:, mine]
    )


def _excess(own: Own, away: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Percent of loss over the lowest, `away` octaves from it, with bias and interval.

    A replicate's regret is that of a rate which is wrong by its own error too, so that the
    distribution of replicates holds the bias twice at most; the ends are never below zero.
    """
    fitted = 100 * np.expm1(rise(own.shapes, away))
    replicates = 100 * np.expm1(rise(own.shape_draws, drawn))
    corrected = np.maximum(fitted - (replicates.mean(axis=0) - fitted), 0.0)
    low, high = np.quantile(replicates, QUANTILES, axis=0)
    bias = replicates.mean(axis=0) - fitted
    return {
        "percent": corrected,
        "low": np.minimum(np.maximum(low - bias, 0.0), corrected),
        "high": np.maximum(high, corrected),
        "fitted_percent": fitted,
    }


def _optimism(rows: pd.DataFrame, own: Own, place: int, noise: float) -> float:
    """By how many percent the lowest of k noisy trials lies below its own true loss."""
    cell = own.cells.iloc[[place]]
    mine = rows.merge(columns_of(cell, CELL), on=CELL)
    z = np.log2(floats(mine, "learning_rate")) - float(floats(cell, "log2_rate")[0])
    true = rise(own.shapes[place], z)
    noises = np.random.default_rng(0).normal(0.0, noise, (2000, len(true)))
    chosen = np.argmin(true + noises, axis=1)
    return float(-100 * np.mean(noises[np.arange(len(noises)), chosen]))
