"""Loss under any learning-rate schedule: the multi-power law (Luo et al. 2503.12811).

A run that stops before its learning rate has decayed has a loss above that of a run planned to end
there, by an amount that grows with size, so mixing both kinds of rows biases exponents. The law is
fitted to curves under several schedules and then predicts the loss after a finished decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.laws.law import NamedArrays
from analysis.tables.frames import Array

RATES = "rates"
"""Column with one array per row: the learning rate of every step up to that row."""


@dataclass(frozen=True)
class MultiPower:
    """L = E + A S^-alpha - B sum_k (eta_{k-1} - eta_k) (1 - (1 + C eta_k^-gamma S_k)^-beta).

    S is the sum of all rates, S_k of those from step k on. Source: Luo et al. 2503.12811.
    """

    target: str = "loss_nats"
    name: str = "multi-power"
    by: tuple[str, ...] = ()
    varies: frozenset[str] = frozenset()
    own: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()
    floor: str | None = "E"
    power: str | None = None
    parameters: tuple[str, ...] = ("A", "alpha", "B", "C", "gamma", "beta", "E")
    coefficients: tuple[str, ...] = ("A", "E")
    exponents: tuple[str, ...] = ()
    logs: frozenset[str] = frozenset({"A", "B", "C", "E", "beta"})
    columns: tuple[str, ...] = ()

    def centres(self, rows: pd.DataFrame) -> dict[str, float]:
        """The mean log of the summed rates, and the log of the highest rate."""
        sums = [np.sum(rates) for rates in rows[RATES]]
        highest = max(float(np.max(rates)) for rates in rows[RATES])
        return {"S": float(np.log(sums).mean()), "peak": float(np.log(highest))}

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """Drops of the rate and what follows them, padded: (rows, most drops)."""
        drops = [_drops(np.asarray(rates, dtype=np.float64)) for rates in rows[RATES]]
        most = max(1, *(len(each) for each in drops))
        padded = np.zeros((len(rows), most, 3))
        # Padding: a drop of zero adds nothing, and ln 1 keeps the unused logs finite.
        padded[:, :, 1:] = 1.0
        for place, each in enumerate(drops):
            padded[place, : len(each)] = each
        sums = np.array([np.sum(rates) for rates in rows[RATES]])
        return {
            "S": np.log(sums) - centres["S"],
            "drop": padded[:, :, 0] / np.exp(centres["peak"]),
            "rate": np.log(padded[:, :, 1]) - centres["peak"],
            "area": np.log(padded[:, :, 2]) - centres["S"],
        }

    def evaluate(self, p: NamedArrays, x: NamedArrays) -> tuple[Array, dict[str, Array]]:
        """Ln of the loss; NaN where the law gives a negative loss."""
        start = np.exp(p["A"] - p["alpha"] * x["S"])
        deep = {name: p[name][:, :, None] for name in ("C", "gamma", "beta")}
        logs = deep["C"] - deep["gamma"] * x["rate"] + x["area"]
        inner, beta = np.exp(logs), np.exp(deep["beta"])
        # (1 + x)^-beta through log1p: x is tiny for drops late in the schedule.
        left = np.exp(-beta * np.log1p(inner))
        size = np.exp(p["B"])
        # Derivative of 1 - (1 + x)^-beta by ln x: beta x (1 + x)^(-beta - 1).
        by_log = x["drop"] * beta * left * inner / (1.0 + inner)
        gained = size * (x["drop"] * (1.0 - left)).sum(axis=2)
        loss = np.exp(p["E"]) + start - gained
        slopes = {
            "E": np.exp(p["E"]) / loss,
            "A": start / loss,
            "alpha": -x["S"] * start / loss,
            "B": -gained / loss,
            "C": -size * by_log.sum(axis=2) / loss,
            "gamma": size * (by_log * x["rate"]).sum(axis=2) / loss,
            "beta": -size * (x["drop"] * beta * np.log1p(inner) * left).sum(axis=2) / loss,
        }
        return np.log(loss), slopes

    def natural(self, p: NamedArrays, centres: Mapping[str, float]) -> dict[str, Array]:
        """Parameters for rates as they are in the table."""
        return {
            **{name: p[name] for name in ("alpha", "gamma", "beta", "E")},
            "A": p["A"] + p["alpha"] * centres["S"],
            "B": p["B"] - centres["peak"],
            "C": p["C"] + p["gamma"] * centres["peak"] - centres["S"],
        }

    def internal(
        self, values: Mapping[str, float], centres: Mapping[str, float]
    ) -> dict[str, float]:
        """The inverse of `natural`."""
        inner = {n: float(np.log(v) if n in self.logs else v) for n, v in values.items()}
        inner["A"] -= float(values["alpha"]) * centres["S"]
        inner["B"] += centres["peak"]
        inner["C"] += centres["S"] - float(values["gamma"]) * centres["peak"]
        return inner


MULTI_POWER = MultiPower()


def _drops(rates: Array) -> Array:
    """One row per step at which the rate falls: by how much, to what, and the sum from there."""
    areas = np.cumsum(rates[::-1])[::-1]
    fallen = rates[:-1] - rates[1:]
    at = np.flatnonzero(fallen) + 1
    # A schedule may end at a rate of zero, whose log would not be finite.
    least = 1e-12 * rates.max()
    after = np.maximum(np.stack([rates[at], areas[at]], axis=1), least)
    return np.concatenate([fallen[at - 1, None], after], axis=1)
