"""Starting points by variable projection: a grid over exponents, the rest by least squares.

Source: Golub and Pereyra 1973 (variable projection). At fixed exponents the law is linear in A, B
and E, which non-negative least squares finds; the best cells of the grid start the optimiser. arXiv
2603.22339 compares this with other estimators of the same law.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from analysis.laws.bound import Design, Form, bind
from analysis.laws.law import Law
from analysis.laws.transformed import Offset, Repetition
from analysis.tables.frames import Array, floats

POWERS = (0.3, 0.5, 1.0)
GAPS = (0.02, 0.1, 0.3, 1.0)
FEW = 3
REPEATS = (np.geomspace(1.0, 1000.0, 7), np.geomspace(0.3, 300.0, 7))


def seeds(form: Form, rows: pd.DataFrame, grid: Array, count: int) -> Array:
    """The most promising parameter vectors, (starts, parameters)."""
    law = form.law
    if not isinstance(law, Law):
        return _scattered(form, count)
    if isinstance(law.transform, Repetition):
        return _repeated(form, law, rows, grid)
    base = _bases(form, law, rows, grid)
    slots = sorted({slot for (name, _), slot in form.slots.items() if name in law.coefficients})
    # Divided by the observed loss: distance from one is a relative error, which is the error of ln
    # L to first order.
    columns = _columns(form.design(rows), law, base, slots) / floats(rows, law.target)
    values, misfit = _non_negative(columns)
    best = np.argsort(misfit, kind="stable")[:count]
    chosen = base[best]
    # A coefficient of zero has no log: it starts at a ten-thousandth of the mean loss.
    chosen[:, slots] = np.log(np.maximum(values[best], 1e-4 * floats(rows, law.target).mean()))
    if law.power is None:
        return chosen
    for name in law.coefficients:
        # The columns carry the outer power p, so A^p was solved for: ln A is its log over p.
        if name != law.floor:
            own = _slots(form, name)
            chosen[:, own] /= np.exp(chosen[:, _slots(form, law.power)])
    return _powered(form, law, chosen)


def _bases(form: Form, law: Law, rows: pd.DataFrame, grid: Array) -> Array:
    """Every cell of the grid as a parameter vector, coefficients still zero."""
    # Without a floor, or with a shifted variable, an exponent may have either sign.
    signed = law.floor is None or isinstance(law.transform, Offset)
    values = np.concatenate([-grid[::-2], grid[::2]]) if signed else grid
    axes = dict.fromkeys(law.exponents, values)
    if isinstance(law.transform, Offset):
        # k of loss to loss is near 1 and fitted as minus the exponent.
        axes = {name: -np.geomspace(0.3, 3.0, 13) for name in law.exponents}
        lowest = float(floats(rows, law.transform.column).min())
        # E_x lies below every loss of the data, or the log of the difference does not exist.
        axes["E_x"] = lowest * (1.0 - np.array(GAPS))
    fixed = [f for f in law.factors if not isinstance(f.exponent, str)]
    extra = [grid] if law.power is not None and fixed else []
    cells = list(product(*axes.values(), *extra))
    base = np.zeros((len(cells), len(form.labels)))
    for place, name in enumerate(axes):
        base[:, _slots(form, name)] = np.array([cell[place] for cell in cells])[:, None]
    if law.power is not None:
        # With the power p held at a grid value, terms fall with p times the inner exponents.
        power = np.array([cell[-1] for cell in cells]) if extra else np.ones(len(cells))
        base[:, _slots(form, law.power)] = np.log(power)[:, None]
        for name in law.exponents:
            base[:, _slots(form, name)] /= power[:, None]
    return base


def _columns(design: Design, law: Law, base: Array, slots: list[int]) -> Array:
    """Each term at coefficient 1, to the outer power if there is one: (cells, slots, rows)."""
    columns = np.zeros((len(base), len(slots), design.shape[0]))
    for group in design.groups:
        p = {name: base[:, slot, None] for name, slot in group.slots.items()}
        power = np.exp(p[law.power]) if law.power else 1.0
        for name in law.coefficients:
            value: Array | float = 1.0
            if name != law.floor:
                terms = tuple(term for term in law.terms if term.coefficient == name)
                alone = replace(law, terms=terms, floor=None, power=None)
                value = np.exp(power * alone.evaluate(p, group.x)[0])
            columns[:, slots.index(group.slots[name]), group.rows] += value
    return columns


def _non_negative(columns: Array) -> tuple[Array, Array]:
    """Weights of the columns, none negative, that bring their sum nearest to one; the misfits.

    Few columns: every set of active ones is tried for all cells at once.
    """
    cells, count, rows = columns.shape
    if count > FEW:
        solved = [nnls(cell.T, np.ones(rows)) for cell in columns]
        return np.stack([each[0] for each in solved]), np.array([each[1] for each in solved])
    gram = np.matmul(columns, columns.transpose(0, 2, 1))
    sums = columns.sum(axis=2)
    values, misfit = np.zeros((cells, count)), np.full(cells, np.inf)
    for active in product((False, True), repeat=count):
        on = np.flatnonzero(active)
        if not len(on):
            continue
        # Normal equations: a few columns, already of similar size, so squaring costs no digits.
        square = gram[:, on[:, None], on] * (1.0 + 1e-12 * np.eye(len(on)))
        solution = np.linalg.solve(square, sums[:, on, None])[:, :, 0]
        # |sum of columns - 1|^2 at the solution of the normal equations: n - w' (columns 1).
        left = rows - (solution * sums[:, on]).sum(axis=1)
        better = (solution >= 0).all(axis=1) & (left < misfit)
        misfit[better] = left[better]
        values[better] = 0.0
        values[np.ix_(np.flatnonzero(better), on)] = solution[better]
    return values, misfit


def _powered(form: Form, law: Law, best: Array) -> Array:
    """Each start at several outer powers, its inner parameters divided by the power to match."""
    if any(not isinstance(factor.exponent, str) for factor in law.factors):
        return best
    starts = []
    inner = [name for name in law.parameters if name not in (law.floor, law.power)]
    for power in POWERS:
        start = best.copy()
        for name in inner:
            start[:, _slots(form, name)] /= power
        start[:, _slots(form, str(law.power))] = np.log(power)
        starts.append(start)
    return np.concatenate(starts)


def _repeated(form: Form, law: Law, rows: pd.DataFrame, grid: Array) -> Array:
    """Chinchilla starts as if nothing repeated, times a grid of both rates of decay."""
    plain = bind(replace(law, transform=None), rows)
    unrepeated = seeds(plain, rows, grid, 4) if plain.labels else np.zeros((1, 0))
    vectors = []
    for start, data_rate, size_rate in product(unrepeated, *REPEATS):
        vector = np.zeros(len(form.labels))
        for key, slot in plain.slots.items():
            vector[form.slots[key]] = start[slot]
        vector[_slots(form, "R_D")], vector[_slots(form, "R_N")] = np.log([data_rate, size_rate])
        vectors.append(vector)
    # Every one is optimised: the surface has several valleys.
    return np.stack(vectors)


def _scattered(form: Form, count: int) -> Array:
    """Starts around zero in fitted coordinates, for laws with a handful of scaled parameters."""
    generator = np.random.default_rng(0)
    return generator.normal(0.0, 1.5, (8 * count, len(form.labels)))


def _slots(form: Form, name: str) -> list[int]:
    return sorted({slot for (owner, _), slot in form.slots.items() if owner == name})
