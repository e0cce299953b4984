"""A law bound to groups of rows and to the centre of its data, as the solver sees it.

Centring on the mean logs is what makes the five-parameter problem solvable: at N = D = 1 the
coefficients and exponents are almost perfectly correlated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.laws.law import Law, group_of
from analysis.laws.multi_power import MultiPower
from analysis.laws.task_error import TaskError
from analysis.tables.frames import Array

AnyLaw = Law | TaskError | MultiPower


@dataclass(frozen=True)
class GroupRows:
    """The rows of one group: where they are, where their parameters are, what the law reads.

    Attributes:
        held: parameters that are not fitted in this group, in centred coordinates.
    """

    rows: Array
    slots: Mapping[str, int]
    x: Mapping[str, Array]
    held: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """The rows that a bound law is evaluated on, group by group.

    Attributes:
        fixed: parameters that are fitted in no group, in centred coordinates.
        shape: (rows, parameters).
    """

    law: AnyLaw
    groups: tuple[GroupRows, ...]
    fixed: Mapping[str, float]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Form:
    """A law bound to groups and to the centre of the data it is fitted on.

    Attributes:
        slots: place in the parameter vector of each (parameter name, group).
        labels: readable name of each place.
    """

    law: AnyLaw
    groups: tuple[str, ...]
    centres: Mapping[str, float]
    slots: Mapping[tuple[str, str], int]
    labels: tuple[str, ...]

    def design(self, rows: pd.DataFrame) -> Design:
        """The law on these rows, which need its columns and its groups.

        Raises:
            ValueError: a row belongs to a group that the law was not bound to.
        """
        names = np.array(group_of(rows, self.law.by), dtype=object)
        unknown = sorted(set(names.tolist()) - set(self.groups))
        if unknown:
            raise ValueError(
                f"the law was fitted on {', '.join(self.groups)}, but a row is of {unknown[0]}; "
                "fit it with rows of that group"
            )
        # The centres of the fit, not of these rows: parameters belong to them.
        x = self.law.prepare(rows, self.centres)
        parts = []
        for group in self.groups:
            mine = np.flatnonzero(names == group)
            # Constants of a reparametrisation, such as centres, have no rows to choose from.
            chosen = {name: value[mine] if value.ndim else value for name, value in x.items()}
            parts.append(GroupRows(mine, self.slots_of(group), chosen))
        return Design(self.law, tuple(parts), self._fixed(), (len(names), len(self.labels)))

    def slots_of(self, group: str) -> dict[str, int]:
        """Place of each fitted parameter of one group."""
        return {name: slot for (name, owner), slot in self.slots.items() if owner == group}

    def natural(self, theta: Array, group: str) -> dict[str, Array]:
        """One group's parameters away from the centring: ln A, alpha, ln B, beta, ln E.

        `theta` is (..., parameters), and each value has the leading shape.
        """
        p = {name: theta[..., slot] for name, slot in self.slots_of(group).items()}
        shape = theta.shape[:-1]
        p |= {name: np.full(shape, value) for name, value in self._fixed().items()}
        return self.law.natural(p, self.centres)

    def pivots(self, theta: Array, group: str) -> dict[str, float]:
        """Each term's value at the data centre, in the unit of the target."""
        slots = self.slots_of(group)
        power = self.law.power
        # At the centre the logs are zero: what is left of a term is its coefficient.
        outer = float(np.exp(theta[slots[power]])) if power in slots else 1.0
        return {
            name: float(np.exp(theta[slots[name]] * (1.0 if name == self.law.floor else outer)))
            for name in self.law.coefficients
            if name in slots
        }

    def _fixed(self) -> dict[str, float]:
        if not self.law.fixed:
            return {}
        values = dict(self.law.fixed)
        inner = self.law.internal(values, self.centres)
        return {name: inner[name] for name in values}


def bind(law: AnyLaw, rows: pd.DataFrame) -> Form:
    """Give a law its groups, its centre and its parameter vector's layout."""
    parts = rows[list(law.by)].astype(str).to_numpy() if law.by else np.empty((len(rows), 0))
    of_group = dict(zip(group_of(rows, law.by), parts.tolist(), strict=True))
    fixed, own = {name for name, _ in law.fixed}, dict(law.own)
    slots: dict[tuple[str, str], int] = {}
    labels: list[str] = []
    for name in (name for name in law.parameters if name not in fixed):
        columns = own.get(name, law.by) if name in law.varies else ()
        seen: dict[str, int] = {}
        for group, levels in of_group.items():
            # A parameter that differs with some columns only is shared by the groups that agree
            # in them, so its place is looked up by those levels.
            owner = " on ".join(levels[law.by.index(column)] for column in columns)
            if owner not in seen:
                labels.append(f"{name} [{owner}]" if owner else name)
                seen[owner] = len(labels) - 1
            slots[name, group] = seen[owner]
    return Form(law, tuple(of_group), law.centres(rows), slots, tuple(labels))


def log_loss(design: Design, theta: Array) -> Array:
    """Predict ln of the target, (replicates, rows), from theta (replicates, parameters)."""
    predicted = np.empty((len(theta), design.shape[0]))
    for group in design.groups:
        predicted[:, group.rows] = _evaluate(design, group, theta)[0]
    return predicted


def log_loss_and_slopes(design: Design, theta: Array) -> tuple[Array, Array]:
    """Predict ln of the target, and its derivatives as (replicates, parameters, rows)."""
    rows, parameters = design.shape
    predicted = np.empty((len(theta), rows))
    slopes = np.zeros((len(theta), parameters, rows))
    single = len(design.groups) == 1
    for group in design.groups:
        value, by_name = _evaluate(design, group, theta)
        # Writing through a slice is faster than through indices; a bootstrap spends its time here.
        where = slice(None) if single else group.rows
        predicted[:, where] = value
        for name, slot in group.slots.items():
            slopes[:, slot, where] = by_name[name]
    return predicted, slopes


def log_loss_and_jacobian(design: Design, theta: Array) -> tuple[Array, Array]:
    """Predict ln of the target, and its derivatives as (replicates, rows, parameters)."""
    predicted, slopes = log_loss_and_slopes(design, theta)
    return predicted, slopes.transpose(0, 2, 1)


def _evaluate(design: Design, group: GroupRows, theta: Array) -> tuple[Array, dict[str, Array]]:
    p = {name: theta[:, slot, None] for name, slot in group.slots.items()}
    fixed = {**design.fixed, **group.held}
    p |= {name: np.full((1, 1), value) for name, value in fixed.items()}
    return design.law.evaluate(p, group.x)
