"""Laws whose variables depend on parameters: repeated data, and one loss as a function of another.

Repetition is Muennighoff et al. 2305.16264, loss to loss Brandfonbrener et al. 2411.12925.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.laws.catalog import CHINCHILLA
from analysis.laws.law import Factor, Law, NamedArrays, Term
from analysis.tables.frames import Array, floats

SIZE, DATA = "parameters", "tokens"


@dataclass(frozen=True)
class Repetition:
    """Effective tokens and parameters when the data repeat.

    D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), and N' likewise from the size U_N that is
    compute-optimal for U unique tokens. Source: Muennighoff et al. 2305.16264, section 3.
    """

    parameters: tuple[str, ...] = ("R_D", "R_N")
    logs: frozenset[str] = frozenset({"R_D", "R_N"})
    columns: tuple[str, ...] = ("unique_tokens",)

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """Logs that are not centred, and the centres, which are not per row."""
        size, data = np.log(floats(rows, SIZE)), np.log(floats(rows, DATA))
        # Fewer tokens than unique ones: no repetition, D' = D.
        unique = np.minimum(np.log(floats(rows, "unique_tokens")), data)
        return {
            "log N": size,
            "log D": data,
            "log U": unique,
            "centre N": np.array(centres[SIZE]),
            "centre D": np.array(centres[DATA]),
        }

    def apply(self, p: NamedArrays, x: NamedArrays) -> dict[str, tuple[Array, dict[str, Array]]]:
        """Centred logs of N' and D', with their derivatives."""
        shift_size, shift_data = x["centre N"], x["centre D"]
        data, _, by_rate = _effective(x["log U"], x["log D"], p["R_D"])
        best, slopes = _optimal_size(p, x["log U"], (shift_size, shift_data))
        # A model below the optimal size has no excess parameters, so U_N = N and no slope by it.
        free = best < x["log N"]
        size, by_best, by_size_rate = _effective(np.minimum(best, x["log N"]), x["log N"], p["R_N"])
        size_slopes = {name: by_best * free * slope for name, slope in slopes.items()}
        return {
            SIZE: (size - shift_size, {**size_slopes, "R_N": by_size_rate}),
            DATA: (data - shift_data, {"R_D": by_rate}),
        }


@dataclass(frozen=True)
class Offset:
    """A loss measured from a floor of its own: ln(L_x - E_x) is the variable."""

    column: str
    parameters: tuple[str, ...] = ("E_x",)
    logs: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """The loss that the law reads."""
        return (self.column,)

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """The loss, and the centre."""
        return {"loss": floats(rows, self.column), "centre": np.array(centres[self.column])}

    def apply(self, p: NamedArrays, x: NamedArrays) -> dict[str, tuple[Array, dict[str, Array]]]:
        """The centred log of the loss above its floor."""
        # A floor above a loss is no solution: the misfit there is large, so steps are refused.
        left = np.maximum(x["loss"] - p["E_x"], 1e-12)
        return {self.column: (np.log(left) - x["centre"], {"E_x": -1.0 / left})}


REPEAT = replace(CHINCHILLA, name="repeat", transform=Repetition())


def loss_to_loss(from_column: str, to_column: str) -> Law:
    """L_y = E_y + K (L_x - E_x)^k. Source: Brandfonbrener et al. 2411.12925."""
    # Terms fall with their variable, so k is fitted as minus the exponent.
    term = Term("K", (Factor("minus_k", ((from_column, 1.0),)),))
    return Law("loss-to-loss", (term,), transform=Offset(from_column), target=to_column)


def _effective(unique: Array, total: Array, log_rate: Array) -> tuple[Array, Array, Array]:
    """Ln of the effective amount, and its derivatives by ln unique and by ln rate."""
    ratio = np.exp(total - unique)
    rate = np.exp(log_rate)
    excess = ratio - 1.0
    decay = np.exp(-excess / rate)
    # 1 - exp(-x) would lose every digit at large rates and fake an optimum there.
    gained = -rate * np.expm1(-excess / rate)
    # d gained / d ratio = decay, and d ratio / d ln U = -ratio.
    by_unique = 1.0 - decay * ratio / (1.0 + gained)
    # d gained / d ln R = gained - excess * decay.
    return unique + np.log1p(gained), by_unique, (gained - excess * decay) / (1.0 + gained)


def _optimal_size(
    p: NamedArrays, log_unique: Array, shifts: tuple[Array, Array]
) -> tuple[Array, dict[str, Array]]:
    """Ln of the size that is compute-optimal for a number of tokens, with its derivatives."""
    # alpha A N^-alpha = beta B U^-beta at the optimum for C = 6 N D (Hoffmann et al. 2203.15556).
    alpha, beta = p["alpha"], p["beta"]
    log_a, log_b = p["A"] + alpha * shifts[0], p["B"] + beta * shifts[1]
    rest = np.log(alpha) + log_a - np.log(beta) - log_b
    size = (rest + beta * log_unique) / alpha
    return size, {
        "A": 1.0 / alpha,
        "B": -1.0 / alpha,
        "alpha": (1.0 / alpha + shifts[0] - size) / alpha,
        "beta": (log_unique - 1.0 / beta - shifts[1]) / alpha,
    }
