"""A downstream task's error as a function of the loss (Gadre et al. 2403.08540)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.laws.law import NamedArrays
from analysis.tables.frames import Array, floats


@dataclass(frozen=True)
class TaskError:
    """error = ceiling - k exp(-g L). Source: Gadre et al. 2403.08540, section 3.

    Fitted as ln ceiling, ln g, and the share of the ceiling that is gained at the lowest loss of
    the data, which keeps the error positive there.
    """

    loss: str = "loss_nats"
    target: str = "task_error"
    name: str = "task error"
    by: tuple[str, ...] = ()
    varies: frozenset[str] = frozenset()
    own: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()
    floor: str | None = None
    power: str | None = None
    parameters: tuple[str, ...] = ("ceiling", "k", "g")
    coefficients: tuple[str, ...] = ()
    exponents: tuple[str, ...] = ()
    logs: frozenset[str] = frozenset({"ceiling", "k", "g"})

    @property
    def columns(self) -> tuple[str, ...]:
        """The loss that the law reads."""
        return (self.loss,)

    def centres(self, rows: pd.DataFrame) -> dict[str, float]:
        """The lowest loss of the data."""
        return {"lowest": float(floats(rows, self.loss).min())}

    def prepare(self, rows: pd.DataFrame, centres: Mapping[str, float]) -> dict[str, Array]:
        """The loss above the lowest one."""
        return {"above": floats(rows, self.loss) - centres["lowest"]}

    def evaluate(self, p: NamedArrays, x: NamedArrays) -> tuple[Array, dict[str, Array]]:
        """Ln of the error; NaN where the law gives a negative error."""
        rate = np.exp(p["g"])
        top = 1.0 / (1.0 + np.exp(-p["k"]))
        # (k / ceiling) exp(-g L): `top` is its value at the lowest loss, as a logistic function, so
        # the error 1 - share stays positive at every loss of the data.
        share = top * np.exp(-rate * x["above"])
        by_log_share = -share / (1.0 - share)
        slopes = {
            "ceiling": np.ones_like(share),
            # d share / d logit = share (1 - top).
            "k": by_log_share * (1.0 - top),
            "g": -by_log_share * rate * x["above"],
        }
        return p["ceiling"] + np.log1p(-share), slopes

    def natural(self, p: NamedArrays, centres: Mapping[str, float]) -> dict[str, Array]:
        """Ln of ceiling, k and g."""
        top = -np.log1p(np.exp(-p["k"]))
        gained = p["ceiling"] + top + np.exp(p["g"]) * centres["lowest"]
        return {"ceiling": p["ceiling"], "k": gained, "g": p["g"]}

    def internal(
        self, values: Mapping[str, float], centres: Mapping[str, float]
    ) -> dict[str, float]:
        """The logit of the gained share in place of k."""
        share = values["k"] * np.exp(-values["g"] * centres["lowest"]) / values["ceiling"]
        return {
            "ceiling": float(np.log(values["ceiling"])),
            "k": float(np.log(share / (1.0 - share))),
            "g": float(np.log(values["g"])),
        }
