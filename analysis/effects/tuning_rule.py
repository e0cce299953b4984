"""The rule that a search supports: log2 rate = c + a log2 N + b log2 D + g log2 B by architecture.

Ours. All trials are fitted together (analysis.fitting.valleys) instead of the best trial of each
cell: a best of k noisy losses is low by selection, and a best rate on a grid is coarse. An exponent
is shared between architectures where a Wald test, with errors clustered by trunk, cannot tell them
apart. Cells that lie off the rule by more than noise add to its error.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from analysis.fitting.valleys import SHAPE, Trials, ValleyFit, fit_valleys, shapes_of
from analysis.tables.frames import floats, groups, keep, strings

AXES = {
    "parameters": "nominal_parameters",
    "tokens": "horizon_tokens",
    "batch_tokens": "batch_tokens",
}
CELL = ["architecture", "rung", "corpus", "horizon_tokens", "batch_tokens"]
SHARED_TRUNKS = ["architecture", "rung", "corpus", "batch_tokens"]
"""What cells have in common whose trials come from the same trunks."""
SIZES = ["architecture", "rung", "corpus"]
"""What cells have in common that lie off a rule together: the shape of a rung."""
WINDOW = 0.15
"""Trials whose ln L is further above their cell's best are not fitted: far from it, a model that
fails to learn ends on a plateau."""
LEVEL = 0.05
REPLICATES = 2000


@dataclass(frozen=True)
class Rules:
    """One rule per architecture.

    Attributes:
        pivot: N, D and B at which an intercept is the log2 of the rate.
        values: architecture x (intercept, a, b, g).
        draws: replicates x architecture x (intercept, a, b, g).
        shapes: architecture x shape of the valley.
        off: standard deviation of the cells' own optima around the rule beyond noise, by
            architecture, in octaves.
        strays: like `draws`, what these do to the rule.
        tests: the p value of the test that an exponent is the same for all architectures.
        shared: exponents with one value for all.
        freedom: degrees of freedom of the noise, and of `off`.
        ranges: architecture -> axis -> smallest and largest that was searched.
    """

    architectures: tuple[str, ...]
    pivot: dict[str, float]
    values: np.ndarray
    draws: np.ndarray
    shapes: np.ndarray
    off: np.ndarray
    strays: np.ndarray
    tests: dict[str, float]
    shared: tuple[str, ...]
    freedom: tuple[int, int]
    scatter: float
    ranges: dict[str, dict[str, tuple[float, float]]]

    def log2_rate(self, rows: pd.DataFrame) -> np.ndarray:
        """Log2 of each row's rate."""
        return np.sum(_places(rows, self.pivot) * self.values[self._index(rows)], axis=1)

    def log2_error(self, rows: pd.DataFrame) -> np.ndarray:
        """Standard error of `log2_rate`, for a cell that the fit did not see."""
        return np.sqrt(sum(self._variances(rows)))

    def interval(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of log2 of each row's rate, with Satterthwaite's degrees of freedom."""
        noise, off = self._variances(rows)
        freedom = (noise + off) ** 2 / (noise**2 / self.freedom[0] + off**2 / self.freedom[1])
        reach = stats.t.ppf(1 - LEVEL / 2, freedom) * self.log2_error(rows)
        return self.log2_rate(rows) - reach, self.log2_rate(rows) + reach

    def _variances(self, rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        places, index = _places(rows, self.pivot), self._index(rows)
        noise = np.einsum("rk,nrk->nr", places, self.draws[:, index]).var(axis=0)
        strays = np.einsum("rk,nrk->nr", places, self.strays[:, index])
        return noise, np.mean(strays**2, axis=0) + self.off[index] ** 2

    def _index(self, rows: pd.DataFrame) -> np.ndarray:
        return np.array([self.architectures.index(name) for name in strings(rows, "architecture")])


def fitted_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with a loss, none above a uniform guess or far above their cell's best.

    Raises:
        ValueError: none is left.
    """
    usable = keep(
        trials,
        np.isfinite(floats(trials, "loss_nats"))
        & (floats(trials, "loss_nats") < floats(trials, "uniform_nats")),
    )
    kept = [
        keep(cell, np.log(floats(cell, "loss_nats") / floats(cell, "loss_nats").min()) < WINDOW)
        for _, cell in groups(usable, CELL)
    ]
    kept = [cell for cell in kept if len(cell) > 1]
    if not kept:
        raise ValueError("no cell has two trials to fit; run more of the search")
    return pd.concat(kept, ignore_index=True)


def fit_rules(trials: pd.DataFrame, noise: float, seed: int) -> Rules:
    """The rules of all architectures, exponents shared where the trials do not tell them apart.

    Args:
        trials: of `analysis.effects.learning_rates.rate_trials`.
        noise: standard deviation of ln L between seeds.
        seed: of the replicates.

    Raises:
        ValueError: the trials do not determine the rule.
    """
    rows = fitted_trials(trials)
    names = tuple(dict.fromkeys(strings(rows, "architecture").tolist()))
    # No place is further from the pivot than need be, so that intercepts and exponents decorrelate.
    pivot = {
        axis: float(f"{np.exp(np.mean(np.log(floats(rows, column)))):.2g}")
        for axis, column in AXES.items()
    }
    varied = [axis for axis, column in AXES.items() if len(np.unique(floats(rows, column))) > 1]
    apart, _ = _fit(rows, names, pivot, _map(names, varied, ()), noise, seed)
    freedom = _freedom(rows, len(names), 1 + len(varied))
    tests = {
        axis: _same(apart, _map(names, varied, ()), axis, freedom)
        for axis in varied
        if len(names) > 1
    }
    shared = tuple(axis for axis, p in tests.items() if p > LEVEL)
    mapping = _map(names, varied, shared)
    fit, width = _fit(rows, names, pivot, mapping, noise, seed)
    values = (mapping @ fit.coefficients).reshape(len(names), -1)
    draws = (fit.draws[:, :width] @ mapping.T).reshape(len(fit.draws), len(names), -1)
    rules = Rules(
        names, pivot, values, draws, shapes_of(fit.parameters, width, len(names)),
        np.zeros(len(names)), np.zeros_like(draws), tests, shared, (freedom, 1), fit.scatter,
        _ranges(rows, names),
    )  # fmt: skip
    return _with_strays(rules, mapping, own_optima(rows, noise, seed))


@dataclass(frozen=True)
class Own:
    """Each cell's own optimum and the shape of its valley.

    Attributes:
        cells: one row a cell, with `log2_rate`, `log2_error` and `floor` (ln of the loss there).
        centres: replicates of `log2_rate`.
        shapes: cell x shape.
        shape_draws: replicates of them.
    """

    cells: pd.DataFrame
    centres: np.ndarray
    shapes: np.ndarray
    shape_draws: np.ndarray


def own_optima(rows: pd.DataFrame, noise: float, seed: int) -> Own:
    """The optimum of each cell by itself; cells of an architecture share a shape alone."""
    parts = []
    for (name,), mine in groups(rows, ["architecture"]):
        cell, best = _codes(mine, CELL), _best(mine)
        count = len(best)
        start = np.log2(floats(mine, "learning_rate"))[best]
        trials = _as_trials(mine, (str(name),), np.eye(count)[cell], noise)
        fit = fit_valleys(trials, start, REPLICATES, seed)
        drawn = fit.draws[:, :count]
        found = mine.iloc[best].assign(
            log2_rate=fit.coefficients,
            log2_error=drawn.std(axis=0),
            floor=fit.parameters[-count:],
        )
        shape = np.repeat(shapes_of(fit.parameters, count, 1), count, axis=0)
        parts.append((found, drawn, shape, np.repeat(shapes_of(fit.draws, count, 1), count, 1)))
    return Own(
        pd.concat([part[0] for part in parts], ignore_index=True),
        np.concatenate([part[1] for part in parts], axis=1),
        np.concatenate([part[2] for part in parts]),
        np.concatenate([part[3] for part in parts], axis=1),
    )


def _fit(
    rows: pd.DataFrame,
    names: tuple[str, ...],
    pivot: dict[str, float],
    mapping: np.ndarray,
    noise: float,
    seed: int,
) -> tuple[ValleyFit, int]:
    design = _design(rows, names, pivot, mapping)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError(
            "the trials do not determine a rate rule for each architecture: sizes, horizons and "
            "batches vary together; search a grid of them"
        )
    best, rates = _best(rows), np.log2(floats(rows, "learning_rate"))
    start = np.linalg.lstsq(design[best], rates[best], rcond=None)[0]
    return fit_valleys(
        _as_trials(rows, names, design, noise), start, REPLICATES, seed
    ), design.shape[1]


def _as_trials(
    rows: pd.DataFrame, names: tuple[str, ...], design: np.ndarray, noise: float
) -> Trials:
    return Trials(
        x=np.log2(floats(rows, "learning_rate")),
        y=np.log(floats(rows, "loss_nats")),
        cell=_codes(rows, CELL),
        family=np.array([names.index(name) for name in strings(rows, "architecture")]),
        design=design,
        trunk=_codes(rows, ["trunk_id"]),
        noise=noise,
    )


def _map(names: tuple[str, ...], varied: list[str], shared: tuple[str, ...]) -> np.ndarray:
    """From free coefficients to every architecture's intercept and exponents."""
    width, columns = 1 + len(AXES), []
    for place, axis in enumerate([None, *AXES]):
        if axis is not None and axis not in varied:
            continue
        column = np.zeros((len(names), width, len(names)))
        column[np.arange(len(names)), place, np.arange(len(names))] = 1.0
        flat = column.reshape(len(names) * width, len(names))
        columns.append(flat.sum(axis=1, keepdims=True) if axis in shared else flat)
    return np.concatenate(columns, axis=1)


def _same(fit: ValleyFit, mapping: np.ndarray, axis: str, freedom: int) -> float:
    """The p value of the test that all architectures have one exponent."""
    place = 1 + list(AXES).index(axis)
    picks = mapping.reshape(-1, 1 + len(AXES), mapping.shape[1])[:, place]
    contrasts = picks[1:] - picks[0]
    differences = contrasts @ fit.coefficients
    drawn = (fit.draws[:, : mapping.shape[1]] - fit.coefficients) @ contrasts.T
    covariance = np.atleast_2d(drawn.T @ drawn / len(drawn))
    statistic = differences @ np.linalg.solve(covariance, differences) / len(differences)
    return float(stats.f.sf(statistic, len(differences), freedom))


def _with_strays(rules: Rules, mapping: np.ndarray, optima: Own) -> Rules:
    """The rules with how far cells lie off them beyond noise, and what that does to them.

    One value for all architectures: means over cells that share trunks are few. Noise is
    subtracted, and coefficients between such groups cost degrees of freedom.
    """
    own, noise = optima.cells, optima.centres.T
    away = floats(own, "log2_rate") - rules.log2_rate(own)
    group = _codes(own, SIZES)
    count = int(group.max()) + 1
    mean = (np.eye(count)[group] * np.bincount(group) ** -1.0).T
    design = _design(own, rules.architectures, rules.pivot, mapping)
    spare = max(count - np.linalg.matrix_rank(mean @ design), 1)
    excess = np.sum((mean @ away) ** 2) / spare - np.mean(np.var(mean @ noise, axis=1))
    off = np.sqrt(max(float(excess), 0.0))
    shifts = np.random.default_rng(0).normal(0.0, off, (len(rules.draws), count))[:, group]
    strays = shifts @ np.linalg.pinv(design).T @ mapping.T
    return replace(
        rules,
        off=np.full(len(rules.architectures), off),
        strays=strays.reshape(rules.draws.shape),
        freedom=(rules.freedom[0], int(spare)),
    )


def _design(
    rows: pd.DataFrame, names: tuple[str, ...], pivot: dict[str, float], mapping: np.ndarray
) -> np.ndarray:
    places = _places(rows, pivot)
    index = np.array([names.index(name) for name in strings(rows, "architecture")])
    wide = np.zeros((len(rows), len(names), places.shape[1]))
    wide[np.arange(len(rows)), index] = places
    return wide.reshape(len(rows), -1) @ mapping


def _places(rows: pd.DataFrame, pivot: dict[str, float]) -> np.ndarray:
    columns = [np.log2(floats(rows, column) / pivot[axis]) for axis, column in AXES.items()]
    return np.column_stack([np.ones(len(rows)), *columns])


def _freedom(rows: pd.DataFrame, families: int, width: int) -> int:
    trunks = len(set(strings(rows, "trunk_id")))
    return max(trunks - families * (width + SHAPE), 1)


def _ranges(rows: pd.DataFrame, names: tuple[str, ...]) -> dict:
    found = {}
    for name in names:
        mine = keep(rows, strings(rows, "architecture") == name)
        found[name] = {
            axis: (float(floats(mine, column).min()), float(floats(mine, column).max()))
            for axis, column in AXES.items()
        }
    return found


def _best(rows: pd.DataFrame) -> np.ndarray:
    """Where each cell's lowest trial stands."""
    cell, losses = _codes(rows, CELL), floats(rows, "loss_nats")
    order = np.lexsort((losses, cell))
    return order[np.unique(cell[order], return_index=True)[1]]


def _codes(rows: pd.DataFrame, columns: list[str]) -> np.ndarray:
    return rows.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
