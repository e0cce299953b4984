"""The functional forms: each law is a log-sum-exp of forms that are linear in its parameters.

With centred logs u = ln N - mean and v = ln D - mean the Chinchilla law
L = E + A N^-alpha + B D^-beta reads ln L = LSE(a - alpha u, b - beta v, e). Coefficients and
exponents may be shared by all groups of rows or belong to one group each, which gives the nested
family that comparisons are made in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

Array = np.ndarray


@dataclass(frozen=True)
class Term:
    """One summand of a law: coefficient * variable ** -exponent, or a constant."""

    coefficient: str
    exponent: str | None
    variable: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Its parameters, coefficient first."""
        return (self.coefficient,) if self.exponent is None else (self.coefficient, self.exponent)


@dataclass(frozen=True)
class Law:
    """A sum of terms, with the parameters that differ between groups.

    Attributes:
        by: the columns whose combinations are the groups; none for a single group.
        varies: names of the parameters with a value per group; the rest are shared.
    """

    name: str
    terms: tuple[Term, ...]
    by: tuple[str, ...] = ()
    varies: frozenset[str] = frozenset()

    def without(self, coefficient: str) -> "Law":
        """The law with one term left out."""
        return replace(
            self, terms=tuple(term for term in self.terms if term.coefficient != coefficient)
        )

    @property
    def variables(self) -> tuple[str, ...]:
        """The columns that the law reads."""
        return tuple(term.variable for term in self.terms if term.variable is not None)


FLOOR = Term("E", None, None)
CHINCHILLA = Law(
    "chinchilla", (Term("A", "alpha", "parameters"), Term("B", "beta", "tokens"), FLOOR)
)
POWER = Law("power", (Term("K", "gamma", "flops"), FLOOR))


def nested_family(by: tuple[str, ...]) -> dict[str, Law]:
    """The Chinchilla laws between "no difference" (M0) and "nothing shared" (Mfull)."""
    varying = {
        "M0": "",
        "Ma": "A",
        "Mb": "B",
        "Mab": "A B",
        "Me": "E",
        "Meab": "A B E",
        "Mfull": "A B E alpha beta",
    }
    return {
        name: replace(CHINCHILLA, name=name, by=by, varies=frozenset(names.split()))
        for name, names in varying.items()
    }


@dataclass(frozen=True)
class Form:
    """A law bound to groups and to the centre of the data it is fitted on.

    Attributes:
        slots: place in the parameter vector of each (parameter name, group).
        labels: readable name of each place.
    """

    law: Law
    groups: tuple[str, ...]
    centres: Mapping[str, float]
    slots: Mapping[tuple[str, str], int]
    labels: tuple[str, ...]

    def design(self, rows: pd.DataFrame) -> Array:
        """The (terms, rows, parameters) array M with ln(term j of row i) = M[j, i] @ theta."""
        matrix = np.zeros((len(self.law.terms), len(rows), len(self.labels)))
        groups = group_of(rows, self.law.by)
        index = np.arange(len(rows))
        for place, term in enumerate(self.law.terms):
            columns = [self.slots[term.coefficient, group] for group in groups]
            matrix[place, index, columns] = 1.0
            if term.variable is not None and term.exponent is not None:
                columns = [self.slots[term.exponent, group] for group in groups]
                logs = np.log(rows[term.variable].to_numpy(dtype=np.float64))
                matrix[place, index, columns] = self.centres[term.variable] - logs
        return matrix

    def natural(self, theta: Array, group: str) -> dict[str, Array]:
        """One group's parameters away from the centring: ln A, alpha, ln B, beta, ln E.

        `theta` is (..., parameters), and each value has the leading shape.
        """
        values = {}
        for term in self.law.terms:
            coefficient = theta[..., self.slots[term.coefficient, group]]
            if term.variable is not None and term.exponent is not None:
                exponent = theta[..., self.slots[term.exponent, group]]
                coefficient = coefficient + exponent * self.centres[term.variable]
                values[term.exponent] = exponent
            values[term.coefficient] = coefficient
        return values

    def pivots(self, theta: Array, group: str) -> dict[str, float]:
        """Each term's value at the data centre, in the unit of the loss."""
        return {
            term.coefficient: float(np.exp(theta[self.slots[term.coefficient, group]]))
            for term in self.law.terms
        }


def bind(law: Law, rows: pd.DataFrame) -> Form:
    """Give a law its groups, its centre and its parameter vector's layout."""
    groups = tuple(dict.fromkeys(group_of(rows, law.by)))
    slots: dict[tuple[str, str], int] = {}
    labels: list[str] = []
    for name in (name for term in law.terms for name in term.names):
        for group in groups:
            if name in law.varies or group == groups[0]:
                labels.append(f"{name} [{group}]" if name in law.varies and group else name)
            slots[name, group] = len(labels) - 1
    centres = {name: float(np.log(rows[name].astype(np.float64)).mean()) for name in law.variables}
    return Form(law, groups, centres, slots, tuple(labels))


def group_of(rows: pd.DataFrame, by: tuple[str, ...]) -> list[str]:
    """The group label of each row; empty where a law has a single group."""
    if not by:
        return [""] * len(rows)
    return [" on ".join(str(part) for part in parts) for parts in rows[list(by)].to_numpy()]


def log_loss(design: Array, theta: Array) -> Array:
    """Predict ln L, (replicates, rows), from parameter vectors (replicates, parameters)."""
    logs = _log_terms(design, theta)
    peak = logs.max(axis=1)
    return peak + np.log(np.exp(logs - peak[:, None]).sum(axis=1))


def log_loss_and_jacobian(design: Array, theta: Array) -> tuple[Array, Array]:
    """Predict ln L, (replicates, rows), and its derivatives (replicates, rows, parameters)."""
    logs = _log_terms(design, theta)
    peak = logs.max(axis=1)
    shares = np.exp(logs - peak[:, None])
    total = shares.sum(axis=1)
    shares /= total[:, None]
    jacobian = shares[:, 0, :, None] * design[0]
    for place in range(1, len(design)):
        jacobian += shares[:, place, :, None] * design[place]
    return peak + np.log(total), jacobian


def _log_terms(design: Array, theta: Array) -> Array:
    terms, rows, parameters = design.shape
    flat = theta @ design.reshape(terms * rows, parameters).T
    return flat.reshape(len(theta), terms, rows)
