"""Loss to loss: effects of corpus and architecture at equal loss on the neutral set.

After Brandfonbrener et al. 2411.12925 and Mayilvahanan et al. 2502.12120: corpora shift the line of
ln L on one set against ln L on another, architectures hardly do.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.variance_shares import matched_cells, percentiles, size_weights
from analysis.inference.intervals import Interval
from analysis.tables.frames import Array, columns_of, floats, keep, strings
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal

KEYS = ["run_id", "step", "architecture", "corpus", "parameters", "tokens", "flops"]


@dataclass(frozen=True)
class Transfer:
    """ln L on one set as a line in ln L on the neutral set.

    Attributes:
        points: one row per run, `loss_nats` on the neutral set and `loss_there` on the other.
        slope: shared by all arms.
        shifts: per factor and level, the shift of the line against the first level, in ln L.
    """

    evaluation_set: str
    points: pd.DataFrame
    slope: Interval
    shifts: dict[tuple[str, str], Interval]


def transfers(
    points: Table, count: int, generator: np.random.Generator
) -> dict[str, Transfer | Refusal]:
    """Every other evaluation set against the neutral one."""
    sets = sorted({str(name) for name in points.rows["evaluation_set"]} - {points.neutral_set})
    return {name: _transfer(points, name, count, generator) for name in sets}


def _transfer(
    points: Table, name: str, count: int, generator: np.random.Generator
) -> Transfer | Refusal:
    both = paired_losses(points, name)
    cells = matched_cells(both) if len(both) else both
    sizes = len(np.unique(floats(cells, "size"))) if len(cells) else 0
    if sizes < 3:
        return Refusal(
            "R-CELLS",
            f"cells with every architecture and corpus exist at {sizes} sizes, a line needs 3",
            "finish the same (N, D) cells for every arm",
        )
    design, names = _design(cells, points)
    y = np.log(floats(cells, "loss_there"))
    weights = size_weights(floats(cells, "size"), count, generator)
    values = np.array([_line(design, y, each) for each in weights])
    line, method = _line(design, y, np.ones(len(y))), f"bootstrap over {sizes} sizes"
    intervals = [
        percentiles(float(line[place]), values[:, place], method) for place in range(len(line))
    ]
    return Transfer(
        evaluation_set=name,
        points=cells,
        slope=intervals[1],
        shifts=dict(zip(names, intervals[2:], strict=True)),
    )


def paired_losses(points: Table, name: str) -> pd.DataFrame:
    """Runs evaluated on both sets, a row each."""
    rows = points.rows
    here = keep(rows, rows["evaluation_set"] == points.neutral_set)
    there = keep(rows, rows["evaluation_set"] == name)
    there = there.assign(loss_there=floats(there, "loss_nats"))
    left = columns_of(here, [*KEYS, "loss_nats"])
    return left.merge(columns_of(there, [*KEYS[:2], "loss_there"]), on=KEYS[:2])


def _design(cells: pd.DataFrame, points: Table) -> tuple[Array, list[tuple[str, str]]]:
    logs = np.log(floats(cells, "loss_nats"))
    columns, names = [np.ones(len(cells)), logs - logs.mean()], []
    for factor in ("corpus", "architecture"):
        present = set(strings(cells, factor).tolist())
        for level in [each for each in points.levels(factor) if each in present][1:]:
            columns.append((strings(cells, factor) == level).astype(np.float64))
            names.append((factor, level))
    return np.stack(columns, axis=1), names


def _line(design: Array, y: Array, weights: Array) -> Array:
    # Weighted least squares: each row times the root of its weight.
    root = np.sqrt(weights)
    return np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
