"""Variance shares of corpus, architecture, interaction, scale and seed, at matched cells.

A fixed effect for each cell (one N, one D) removes scale from the comparison. Main effects are
averaged over both orders of entry (Lindeman, Merenda and Gold 1980; the Shapley value). Sizes are
resampled: cells of one size share trunks, so they are not independent. Ours: the definition of
cells and the bootstrap over sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.intervals import Interval
from analysis.tables.frames import Array, floats, keep, strings
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal

SAME = 0.03
"""Largest difference of ln N, and of ln D, inside a cell."""
COMPONENTS = ("corpus", "architecture", "interaction", "scale dependence", "seed")
LEAST_SIZES = 3
UNDEFINED_SHARE = 0.05


@dataclass(frozen=True)
class Decomposition:
    """How the variance of ln L at equal N and D divides.

    Attributes:
        shares: component -> share of the sum of squares inside cells; they add up to one. `scale
            dependence` is what the effects change by from cell to cell, `seed` what seeds leave.
        deviations: component -> standard deviation of ln L that it explains.
        effects: `corpus` and `architecture` -> largest difference between two levels, in ln L.
        worth: the effects converted to compute, by the slope of ln L in ln C between cells.
        cells: matched cells, of `sizes` sizes.
    """

    evaluation_set: str
    shares: dict[str, Interval]
    deviations: dict[str, Interval]
    effects: dict[str, Interval]
    worth: dict[str, Interval | Refusal]
    cells: int
    sizes: int


def decompose(
    rows: pd.DataFrame, count: int, generator: np.random.Generator
) -> Decomposition | Refusal:
    """Divide the variance of ln L on one evaluation set; only complete cells are used.

    Args:
        rows: decayed points with `architecture`, `corpus`, `parameters`, `tokens`, `flops`.
        count: bootstrap replicates over sizes.
        generator: of the bootstrap.
    """
    for factor in ("corpus", "architecture"):
        levels = sorted(set(strings(rows, factor).tolist())) if len(rows) else []
        if len(levels) < 2:
            reason = f"{len(levels)} level of {factor}"
            return Refusal("R-FACTOR", reason, f"add a second {factor}")
    cells = matched_cells(rows)
    sizes = len(np.unique(floats(cells, "size"))) if len(cells) else 0
    if sizes < LEAST_SIZES:
        return Refusal(
            "R-CELLS",
            f"cells with every architecture and corpus exist at {sizes} sizes, "
            f"an interval needs {LEAST_SIZES}",
            "finish the same (N, D) cells for every arm, N within 3 %",
        )
    squares = _Squares(cells)
    weights = size_weights(floats(cells, "size"), count, generator)
    point, drawn = squares.at(np.ones(len(cells))), [squares.at(each) for each in weights]
    method = f"bootstrap over {sizes} sizes, {count} replicates"

    def interval(of: Callable[[dict[str, float]], float]) -> Interval:
        return percentiles(of(point), np.array([of(each) for each in drawn]), method)

    return Decomposition(
        evaluation_set=str(cells["evaluation_set"].iloc[0]),
        shares={n: interval(lambda parts, n=n: parts[n] / parts["total"]) for n in COMPONENTS},
        deviations={
            n: interval(lambda parts, n=n: float(np.sqrt(max(parts[n], 0.0) / parts["rows"])))
            for n in COMPONENTS
        },
        effects={
            factor: interval(lambda parts, factor=factor: parts[f"{factor} effect"])
            for factor in ("corpus", "architecture")
        },
        worth={
            factor: _worth(point, drawn, f"{factor} effect", method)
            for factor in ("corpus", "architecture")
        },
        cells=len(np.unique(floats(cells, "cell"))),
        sizes=sizes,
    )


def decompositions(
    points: Table, count: int, generator: np.random.Generator
) -> dict[str, Decomposition | Refusal]:
    """The same on every evaluation set of a final table, the neutral one first."""
    names = sorted({str(name) for name in points.rows["evaluation_set"]})
    names.sort(key=lambda name: name != points.neutral_set)
    return {
        name: decompose(keep(points.rows, points.rows["evaluation_set"] == name), count, generator)
        for name in names
    }


def matched_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of cells that hold every architecture and corpus, with `size` and `cell` numbers."""
    size, amount = _near(floats(rows, "parameters")), _near(floats(rows, "tokens"))
    # One number for each pair of a size and an amount of tokens.
    cells = size * (int(amount.max(initial=0)) + 1) + amount
    rows = rows.assign(size=size.astype(float), cell=cells.astype(float))
    arms = rows.drop_duplicates(["architecture", "corpus", "cell"])
    names = ("architecture", "corpus")
    full = int(np.prod([len(set(strings(rows, name).tolist())) for name in names]))
    held = arms["cell"].value_counts()
    complete = [cell for cell, number in held.items() if number == full]
    return keep(rows, rows["cell"].isin(complete)).reset_index(drop=True)


def _near(values: Array) -> Array:
    """Numbers of groups whose logarithms lie within SAME of their smallest member."""
    order = np.argsort(values, kind="stable")
    labels, start, label = np.zeros(len(values), dtype=int), -np.inf, -1
    for index in order:
        # Measured from the smallest member, so that a chain of near values cannot grow a wide
        # group.
        if np.log(values[index]) - start > SAME:
            start, label = np.log(values[index]), label + 1
        labels[index] = label
    return labels


def size_weights(sizes: Array, count: int, generator: np.random.Generator) -> Array:
    """Bootstrap counts per row, (count, rows): whole sizes are drawn with replacement."""
    known, place = np.unique(sizes, return_inverse=True)
    drawn = np.zeros((count, len(known)))
    picks = generator.integers(len(known), size=(count, len(known)))
    np.add.at(drawn, (np.arange(count)[:, None], picks), 1.0)
    return drawn[:, place]


def percentiles(estimate: float, values: Array, method: str) -> Interval:
    """A 95 % percentile interval that holds the estimate."""
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), method)


class _Squares:
    """Sums of squares of ln L inside cells, for any weights that are constant inside a size."""

    def __init__(self, cells: pd.DataFrame) -> None:
        self._cells = strings(cells, "cell")
        corpus, architecture = (_dummies(cells, name) for name in ("corpus", "architecture"))
        both = np.einsum("ni,nj->nij", corpus, architecture).reshape(len(cells), -1)
        logs = np.log(floats(cells, "loss_nats"))
        arms = np.char.add(np.char.add(strings(cells, "corpus"), "\n"), self._cells)
        arms = np.char.add(np.char.add(arms, "\n"), strings(cells, "architecture"))
        self._y = _inside(logs, self._cells)
        self._seed = _inside(logs, arms)
        self._scale = np.log(floats(cells, "flops")), logs
        self._corpus = _inside(corpus, self._cells)
        self._architecture = _inside(architecture, self._cells)
        self._mains = np.hstack([self._corpus, self._architecture])
        self._all = np.hstack([self._mains, _inside(both, self._cells)])

    def at(self, weights: Array) -> dict[str, float]:
        """Each component's sum of squares; main effects averaged over both orders (Shapley)."""
        root = np.sqrt(weights)
        total = float(weights @ self._y**2)
        left = {
            name: self._left(design, root)[0]
            for name, design in (
                ("corpus", self._corpus), ("architecture", self._architecture), ("all", self._all),
            )
        }  # fmt: skip
        # Shapley over two factors: the mean of entering first and entering second.
        mains, effects = self._left(self._mains, root)
        seed = float(weights @ self._seed**2)
        split = self._corpus.shape[1]
        return {
            "corpus": 0.5 * (total - left["corpus"] + left["architecture"] - mains),
            "architecture": 0.5 * (total - left["architecture"] + left["corpus"] - mains),
            "interaction": max(mains - left["all"], 0.0),
            "scale dependence": max(left["all"] - seed, 0.0),
            "seed": seed,
            "total": max(total, 1e-300),
            "rows": float(weights.sum()),
            # The first level has no column of its own; its effect is the appended 0.
            "corpus effect": float(np.ptp(np.append(effects[:split], 0.0))),
            "architecture effect": float(np.ptp(np.append(effects[split:], 0.0))),
            "slope": self._slope(weights),
        }

    def _left(self, design: Array, root: Array) -> tuple[float, Array]:
        effects = np.linalg.lstsq(design * root[:, None], self._y * root, rcond=None)[0]
        return float((root**2) @ (self._y - design @ effects) ** 2), effects

    def _slope(self, weights: Array) -> float:
        compute, loss = self._scale
        compute = compute - weights @ compute / weights.sum()
        spread = float(weights @ compute**2)
        return float(weights @ (compute * loss)) / spread if spread > 0 else float("nan")


def _worth(
    point: dict[str, float], drawn: list[dict[str, float]], effect: str, method: str
) -> Interval | Refusal:
    """An effect as the factor of compute that changes ln L as much."""

    def factor(parts: dict[str, float]) -> float:
        downhill = parts["slope"] < 0
        return float(np.exp(min(parts[effect] / -parts["slope"], 700.0))) if downhill else np.nan

    values = np.array([factor(each) for each in drawn])
    undefined = float((~np.isfinite(values)).mean())
    if undefined > UNDEFINED_SHARE or not np.isfinite(factor(point)):
        return Refusal(
            "R-MULT",
            f"loss does not fall with compute in {100 * undefined:.0f} % of the replicates",
            "add sizes or horizons",
        )
    return percentiles(factor(point), np.where(np.isnan(values), np.inf, values), method)


def _dummies(rows: pd.DataFrame, factor: str) -> Array:
    """Columns of zeros and ones for every level but the first, in the order of first appearance."""
    levels = list(dict.fromkeys(strings(rows, factor).tolist()))
    values = strings(rows, factor)
    return np.stack([values == level for level in levels[1:]], axis=1).astype(np.float64)


def _inside(values: Array, labels: Array) -> Array:
    """Values less the mean of their group."""
    _, place = np.unique(labels, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    # One bincount for each column: a factor's columns are few, its rows many.
    flat = values.reshape(len(values), -1)
    means = np.stack([np.bincount(place, weights=column) / counts for column in flat.T], axis=1)
    return (flat - means[place]).reshape(values.shape)
