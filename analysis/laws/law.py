"""Functional forms of scaling laws: terms, factors, and their log-sum-exp with derivatives.

Every law predicts the ln of its target. With centred logs u = ln N - mean and v = ln D - mean the
Chinchilla law L = E + A N^-alpha + B D^-beta reads ln L = LSE(a - alpha u, b - beta v, e), LSE
being log-sum-exp (Hoffmann et al. 2203.15556, approach 3; centred, the parameters of the solver are
of similar size). Any parameter may be shared by all groups of rows or differ between them, which
gives the nested family that comparisons use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd

from analysis.tables.frames import Array, floats

NamedArrays = Mapping[str, Array]


@dataclass(frozen=True)
class Factor:
    """A variable to the power of minus an exponent, which is a parameter or a fixed number.

    Attributes:
        columns: the variable, as powers of columns of the table.
    """

    exponent: str | float
    columns: tuple[tuple[str, float], ...]

    @property
    def variable(self) -> str:
        """Readable name of the variable."""
        return " ".join(name if power == 1 else f"{name}^{power:g}" for name, power in self.columns)

    def logs(self, rows: pd.DataFrame) -> Array:
        """Ln of the variable at each row."""
        parts = [power * np.log(floats(rows, name)) for name, power in self.columns]
        return np.sum(parts, axis=0)


@dataclass(frozen=True)
class Term:
    """One summand of a law: a coefficient times factors."""

    coefficient: str
    factors: tuple[Factor, ...]


class Reparametrisation(Protocol):
    """A change of variables that has parameters of its own."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its own parameters."""
        ...

    @property
    def logs(self) -> frozenset[str]:
        """Those that are fitted as logarithms."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads beside those of the law."""
        ...

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """What `apply` needs of the rows."""
        ...

    def apply(self, p: NamedArrays, x: NamedArrays) -> dict[str, tuple[Array, dict[str, Array]]]:
        """Per variable its centred log, and the derivatives of that by parameters."""
        ...


@dataclass(frozen=True)
class Law:
    """target = floor + (sum of terms) ** power, with the parameters that differ between groups.

    Attributes:
        floor: name of the constant, or None for a law without one.
        power: name of the outer exponent, or None for a plain sum.
        target: the column that is predicted.
        by: the columns whose combinations are the groups; none for a single group.
        varies: names of the parameters with a value per group; the rest are shared.
        own: for some of those, the columns of `by` that they differ with; all if not given.
        fixed: parameters that are not fitted, with their values.
    """

    name: str
    terms: tuple[Term, ...]
    floor: str | None = "E"
    power: str | None = None
    transform: Reparametrisation | None = None
    target: str = "loss_nats"
    by: tuple[str, ...] = ()
    varies: frozenset[str] = frozenset()
    own: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Every factor of every term."""
        return tuple(factor for term in self.terms for factor in term.factors)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents that are parameters."""
        names = (factor.exponent for factor in self.factors)
        return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter, each coefficient before its exponents and the floor last."""
        names: list[str] = []
        for term in self.terms:
            names += [term.coefficient, *(str(f.exponent) for f in term.factors)]
        names = [name for name in names if name in (*self.coefficients, *self.exponents)]
        names += [self.power] if self.power else []
        names += self.transform.parameters if self.transform else ()
        names += [self.floor] if self.floor else []
        return tuple(dict.fromkeys(names))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The parameters that multiply terms, and the floor."""
        names = tuple(term.coefficient for term in self.terms)
        return (*names, self.floor) if self.floor else names

    @property
    def logs(self) -> frozenset[str]:
        """The parameters that are fitted as logarithms, which keeps them positive."""
        names = {*self.coefficients, *([self.power] if self.power else [])}
        return frozenset(names | (self.transform.logs if self.transform else frozenset()))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the law reads, its target and its groups aside."""
        names = [name for factor in self.factors for name, _ in factor.columns]
        return tuple(dict.fromkeys([*names, *(self.transform.columns if self.transform else ())]))

    def centres(self, rows: pd.DataFrame) -> dict[str, float]:
        """The mean log of each variable, where coefficients are fitted."""
        return {factor.variable: float(factor.logs(rows).mean()) for factor in self.factors}

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """The centred logs that `evaluate` needs, (rows,) each."""
        logs = {f.variable: f.logs(rows) - centres[f.variable] for f in self.factors}
        return logs | (self.transform.prepare(rows, centres) if self.transform else {})

    def evaluate(self, p: NamedArrays, x: NamedArrays) -> tuple[Array, dict[str, Array]]:
        """Ln of the target, (replicates, rows), and its derivative by each parameter.

        Args:
            p: each parameter as (replicates, 1), in the centred coordinates.
            x: what `prepare` returned.
        """
        transformed = self.transform.apply(p, x) if self.transform else {}
        logs = [self._log_term(term, p, x, transformed) for term in self.terms]
        slopes: dict[str, Array] = {}
        # Shares of the log-sum-exp are the derivatives of ln L by the log of each term.
        if self.power is None:
            floor = [p[self.floor]] if self.floor else []
            value, shares = _log_sum_exp(logs + floor)
        else:
            inner, shares = _log_sum_exp(logs)
            # ln (sum of terms)^power = power * inner: the floor joins in a second log-sum-exp.
            power = np.exp(p[self.power])
            value, outer = _log_sum_exp([power * inner, *([p[self.floor]] if self.floor else [])])
            slopes[self.power] = outer[0] * power * inner
            shares = [outer[0] * power * share for share in shares] + outer[1:]
        if self.floor:
            slopes[self.floor] = shares[-1]
        # Not strict: the floor's share comes last and belongs to no term.
        for term, share in zip(self.terms, shares, strict=False):
            _add(slopes, term.coefficient, share)
            for factor in term.factors:
                log, inner_slopes = transformed.get(factor.variable, (x[factor.variable], {}))
                if isinstance(factor.exponent, str):
                    _add(slopes, factor.exponent, -share * log)
                for name, slope in inner_slopes.items():
                    _add(slopes, name, -share * _exponent(factor, p) * slope)
        return value, slopes

    def natural(self, p: NamedArrays, centres: Mapping[str, float]) -> dict[str, Array]:
        """Parameters away from the centring: exponents, and ln of what is in `logs`."""
        values = {name: p[name] for name in self.parameters}
        for term in self.terms:
            for factor in term.factors:
                # A exp(-alpha (ln N - mean)) = A exp(alpha mean) N^-alpha.
                shift = _exponent(factor, p) * centres[factor.variable]
                values[term.coefficient] = values[term.coefficient] + shift
        return values

    def internal(
        self, values: Mapping[str, float], centres: Mapping[str, float]
    ) -> dict[str, float]:
        """Centred coordinates of parameters given as they are reported (A, not ln A)."""
        inner = {
            name: float(np.log(value)) if name in self.logs else float(value)
            for name, value in values.items()
        }
        for term in self.terms:
            for factor in term.factors:
                name = factor.exponent
                exponent = values[name] if isinstance(name, str) else name
                inner[term.coefficient] -= float(exponent) * centres[factor.variable]
        return inner

    def without_floor(self) -> "Law":
        """The law with its constant left out."""
        return replace(self, floor=None, varies=self.varies - {str(self.floor)})

    def _log_term(self, term: Term, p: NamedArrays, x: NamedArrays, transformed: Mapping) -> Array:
        log = p[term.coefficient]
        for factor in term.factors:
            variable = transformed[factor.variable][0] if factor.variable in transformed else None
            log = log - _exponent(factor, p) * (
                x[factor.variable] if variable is None else variable
            )
        return log


def _exponent(factor: Factor, p: NamedArrays) -> Array | float:
    return p[factor.exponent] if isinstance(factor.exponent, str) else factor.exponent


def _add(slopes: dict[str, Array], name: str, slope: Array) -> None:
    slopes[name] = slopes[name] + slope if name in slopes else slope


def _log_sum_exp(logs: list[Array]) -> tuple[Array, list[Array]]:
    """LSE of arrays that broadcast, and each one's share of the sum."""
    if len(logs) == 1:
        return logs[0], [np.ones_like(logs[0])]
    # The largest is taken out first, so that exp cannot overflow.
    peak = logs[0]
    for log in logs[1:]:
        peak = np.maximum(peak, log)
    shares = [np.exp(log - peak) for log in logs]
    total = shares[0] + shares[1]
    for share in shares[2:]:
        total = total + share
    return peak + np.log(total), [share / total for share in shares]


def group_of(rows: pd.DataFrame, by: tuple[str, ...]) -> list[str]:
    """The group label of each row; empty where a law has a single group."""
    if not by:
        return [""] * len(rows)
    return [" on ".join(str(part) for part in parts) for parts in rows[list(by)].to_numpy()]
