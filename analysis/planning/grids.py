"""Grids of runs that every architecture can have: isoFLOP budgets and (N, D) cells, realised.

A ladder table is handed in: one row per architecture and rung, with what was counted. Only rungs
that all arms reach within 3 % of one size are used, and tokens are whole batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.compute_optimal.isoflop import token_bias
from analysis.tables.frames import Array, floats, groups, keep
from analysis.validity.refusal import Refusal

SAME_SIZE = 0.03
LEAST_SIZES = 4
COLUMNS = [
    "architecture", "rung", "parameters", "flops_per_token", "tokens", "flops", "budget",
]  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Realised points, one row each, and what to know about them."""

    points: pd.DataFrame
    notes: tuple[str, ...]


def common_rungs(ladder: pd.DataFrame) -> pd.DataFrame:
    """The rungs whose sizes agree within 3 % over all architectures, smallest first.

    Args:
        ladder: `architecture`, `rung`, `total_parameters` and `training_flops_per_token`.
    """
    arms = len(ladder["architecture"].unique())
    kept = []
    for _, rows in groups(ladder, ["rung"]):
        sizes = floats(rows, "total_parameters")
        whole = len(rows["architecture"].unique()) == len(rows) == arms
        if whole and sizes.max() / sizes.min() <= 1 + SAME_SIZE:
            kept.append(rows.assign(size=float(np.exp(np.log(sizes).mean()))))
    if not kept:
        return ladder.iloc[:0].assign(size=np.nan)
    return pd.concat(kept).sort_values("size", kind="stable").reset_index(drop=True)


def cells(ladder: pd.DataFrame, ratios: Sequence[float], batch_tokens: int) -> Grid | Refusal:
    """The same (N, D) cells for every arm, D being `ratio` x N in whole batches."""
    rungs = common_rungs(ladder)
    sizes = len(rungs["size"].unique())
    if sizes < LEAST_SIZES or len(ratios) < LEAST_SIZES:
        return Refusal(
            "R-UNDER",
            f"{sizes} common sizes and {len(ratios)} ratios; {LEAST_SIZES} of each are the least",
            "name more rungs that every architecture reaches, or more ratios",
        )
    parts = [
        _points(rungs, np.maximum(_batches(ratio * floats(rungs, "size"), batch_tokens), 1))
        for ratio in ratios
    ]
    points = pd.concat(parts, ignore_index=True)
    spread = max(ratios) / min(ratios)
    notes = [] if spread >= 10 else [f"D/N spreads only {spread:.2g}x: exponents will be refused"]
    return Grid(points.assign(budget=points["flops"]), tuple(notes))


def isoflop(
    ladder: pd.DataFrame,
    budgets: Sequence[float],
    tokens_per_parameter: float,
    batch_tokens: int,
    span: float = 4.0,
) -> Grid | Refusal:
    """Budgets of equal C, on rungs within `span` of the size whose D/N is the assumed optimum.

    The bias of a parabola through each realised grid is among the notes, for exponents as in
    Hoffmann et al. 2022 (.34, .28).
    """
    rungs = common_rungs(ladder)
    parts, notes, short = [], [], []
    for budget in budgets:
        tokens = budget / floats(rungs, "training_flops_per_token")
        ratio = np.log(tokens / floats(rungs, "size") / tokens_per_parameter)
        # D/N falls as N^-2 along a budget, so a size is off by the square root.
        inside = np.abs(ratio) <= 2 * np.log(span) * (1 + 1e-9)
        mine = keep(rungs, inside)
        if len(mine["size"].unique()) < LEAST_SIZES:
            short.append(f"{budget:.2g}")
            continue
        points = _points(mine, np.maximum(_batches(tokens[inside], batch_tokens), 1))
        parts.append(points.assign(budget=budget))
        notes.append(_note(points, budget, -0.5 * np.unique(ratio[inside])))
    if not parts:
        return Refusal(
            "R-BUDGET",
            f"no budget of {', '.join(short)} FLOP has {LEAST_SIZES} sizes within {span:g}x",
            "name more rungs, or budgets that fit them",
        )
    notes += [f"{each} FLOP left out: fewer than {LEAST_SIZES} sizes" for each in short]
    return Grid(pd.concat(parts, ignore_index=True), tuple(notes))


def _batches(tokens: Array, batch_tokens: int) -> Array:
    return np.round(tokens / batch_tokens) * batch_tokens


def _points(rungs: pd.DataFrame, tokens: Array) -> pd.DataFrame:
    per_token = floats(rungs, "training_flops_per_token")
    return pd.DataFrame(
        {
            "architecture": rungs["architecture"].to_numpy(),
            "rung": rungs["rung"].to_numpy(),
            "parameters": floats(rungs, "total_parameters"),
            "flops_per_token": per_token,
            "tokens": tokens,
            "flops": per_token * tokens,
        }
    )


def _note(points: pd.DataFrame, budget: float, log_sizes: Array) -> str:
    off = float(np.abs(floats(points, "flops") / budget - 1).max())
    bias = 100 * token_bias(0.34, 0.28, log_sizes)
    return f"{budget:.2g} FLOP: realised within {off:.1%}, a parabola errs by {bias:+.1f} % in D*"
