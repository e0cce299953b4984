"""The loss gap between two arms converted to seconds and bytes of memory.

Like the tokens, parameters and FLOPs of `analysis.effects.multipliers`: the ratio of what both arms
need to reach one loss that both have reached. Seconds and bytes are measured at the sizes that were
run and interpolated between them. Ours, with the same refusals.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.effects.multipliers import Multiplier, common_loss, ratio_interval, rows_of
from analysis.fitting.estimator import Fit
from analysis.inference.bootstrap import Bootstrap
from analysis.tables.frames import Array, floats, keep
from analysis.tables.run_region import SizeCurve, run_region
from analysis.validity.refusal import Refusal


@dataclass(frozen=True)
class Resource:
    """What is counted, and in which column it was measured.

    Attributes:
        kind: `rate` for a speed in tokens per second, whose inverse is paid per token; `held` for
            what a model of a size occupies, however long it is trained.
    """

    quantity: str
    column: str
    kind: Literal["rate", "held"]


WALL_CLOCK = Resource("training seconds", "tokens_per_second", "rate")
TRAINING_MEMORY = Resource("bytes in training", "peak_bytes", "held")
DECODING_STATE = Resource("bytes of decoding state", "state_bytes", "held")


def resource_multiplier(
    fit: Fit, replicates: Bootstrap, pair: tuple[str, str], resource: Resource
) -> Multiplier | Refusal:
    """A resource the baseline needs over what the other arm needs, each at its cheapest size.

    `pair` is (baseline, other). What is held is taken at the cheapest size that reaches the loss
    with the most tokens that the arm was run with.
    """
    baseline, other = pair
    prices = {}
    for name in pair:
        price = _price(rows_of(fit, name), resource)
        if isinstance(price, Refusal):
            return price
        prices[name] = price
    loss = common_loss(fit, baseline, other)
    if isinstance(loss, Refusal):
        return loss
    goal = _Goal(loss, resource, prices)
    if not all(np.isfinite(goal.least(fit, fit.theta[None], name)).all() for name in pair):
        return Refusal(
            "R-REACH",
            f"no size that was run reaches {loss:.4g} nats with the tokens that were run",
            "add horizons",
        )
    factor = ratio_interval(fit, replicates, pair, lambda theta, name: goal.least(fit, theta, name))
    if isinstance(factor, Refusal):
        return factor
    return Multiplier(resource.quantity, baseline, other, factor, loss, None)


def _price(rows: pd.DataFrame, resource: Resource) -> SizeCurve | Refusal:
    """The price of a token, or of a model, by size."""
    known = keep(rows, rows[resource.column].notna()) if resource.column in rows else rows.iloc[:0]
    if not len(known):
        return Refusal(
            "R-REACH",
            f"no run has {resource.column}, from which {resource.quantity} are computed",
            f"add a column {resource.column}",
        )
    values = floats(known, resource.column)
    paid = 1.0 / values if resource.kind == "rate" else values
    return SizeCurve.medians(floats(known, "parameters"), paid)


@dataclass(frozen=True)
class _Goal:
    """A loss to reach, and what is counted on the way to it."""

    loss: float
    resource: Resource
    prices: dict[str, SizeCurve]

    def least(self, fit: Fit, theta: Array, group: str) -> Array:
        """The least of the resource that reaches the loss, (replicates,); infinite if none does."""
        arm = run_region(rows_of(fit, group))
        sizes = arm.grid()
        price = self.prices[group](sizes)
        tokens = fit.surface(group, theta).tokens(sizes, self.loss)
        if self.resource.kind == "rate":
            return (tokens * price).min(axis=1)
        # More tokens than were run would reach the loss by the law's word alone.
        most = np.interp(np.log(sizes), np.log(arm.parameters), np.log(arm.most_tokens))
        return np.where(np.log(tokens) <= most, price, np.inf).min(axis=1)
