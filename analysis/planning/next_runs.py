"""Which runs to train next: the information per FLOP about one quantity, and when to stop.

Greedy local design (Chernoff 1953) for one quantity g(theta) (c-optimality, Elfving 1952): a run
with gradient f lowers the variance of g by (g' M^-1 f)^2 / (s^2 + f' M^-1 f). That gain, over the
square root of the cost, is averaged over parameter draws of several laws, so that the design does
not exploit the tail of one law. Ours: the square root of the cost (gain per FLOP buys tiny runs
only), the stopping rule, and the run held out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.laws.bound import Form, log_loss_and_jacobian
from analysis.tables.frames import Array, floats

PRIOR = 2.0
"""Standard deviation of the weak prior on every parameter, in the fit's coordinates."""
STOP_SHARE = 0.05
NORMAL = 1.96


@dataclass(frozen=True)
class Belief:
    """One candidate law: its form, and draws of its parameters (draws, parameters)."""

    form: Form
    theta: Array


Quantity = Callable[[Belief], tuple[Array, Array]]
"""Value (draws,) and gradient (draws, parameters) of the quantity to estimate."""


@dataclass(frozen=True)
class Advice:
    """Runs to train, in order.

    Attributes:
        runs: rows of the candidates, with `gain` (share of the target's variance that a run is
            expected to remove) and `half_width` after it; a last row with `role` hold-out is a
            large run that no fit may use.
        half_width: of the target now, as sampling and the spread between laws make it.
        stop: why the list ends.
    """

    runs: pd.DataFrame
    half_width: float
    stop: str


@dataclass(frozen=True)
class Terms:
    """Constraints of the advice.

    Attributes:
        sigma: noise of ln L of one run.
        budget: FLOPs left.
        half_width: width at which to stop.
        most: runs at most.
        hold_out: share of the budget kept for one large run that tests the law.
    """

    sigma: float
    budget: float
    half_width: float
    most: int
    hold_out: float


def loss_at(point: pd.DataFrame) -> Quantity:
    """Ln of the loss at one point, a frame of one row with the law's columns."""

    def target(belief: Belief) -> tuple[Array, Array]:
        value, slopes = log_loss_and_jacobian(belief.form.design(point), belief.theta)
        return value[:, 0], slopes[:, 0]

    return target


def advise(
    done: pd.DataFrame,
    candidates: pd.DataFrame,
    beliefs: Sequence[Belief],
    target: Quantity,
    terms: Terms,
) -> Advice:
    """Rank the next runs; each row of `done` and `candidates` is a run with its `flops`."""
    state = _State(done, candidates, beliefs, target, terms.sigma)
    costs = floats(candidates, "flops")
    spendable, first, stop = (
        terms.budget * (1 - terms.hold_out),
        0.0,
        "the number of runs is reached",
    )
    records: list[dict] = []
    begin = state.half_width()
    for _ in range(terms.most):
        if state.half_width() <= terms.half_width:
            stop = "the interval is narrow enough"
            break
        # Per square root of the cost: gain per FLOP would buy tiny runs only.
        worth = np.where(costs <= spendable, state.gains() / np.sqrt(costs), -np.inf)
        best = int(worth.argmax())
        if not np.isfinite(worth[best]):
            stop = "the budget is spent"
            break
        if records and worth[best] < STOP_SHARE * first:
            stop = "the next run would gain less than 5 % of what the first did, per sqrt(FLOP)"
            break
        first = first or float(worth[best])
        gain = float(state.gains()[best])
        state.add(best)
        spendable -= costs[best]
        records.append(
            {"index": best, "role": "fit", "gain": gain, "half_width": state.half_width()}
        )
    left = spendable + terms.budget * terms.hold_out
    records += _hold_out(candidates, left)
    chosen = candidates.iloc[[int(each["index"]) for each in records]].reset_index(drop=True)
    columns = ["index", "role", "gain", "half_width"]
    notes = pd.DataFrame(records, columns=pd.Index(columns)).drop(columns="index")
    return Advice(pd.concat([chosen, notes], axis=1), begin, stop)


def design_map(
    done: pd.DataFrame,
    candidates: pd.DataFrame,
    beliefs: Sequence[Belief],
    target: Quantity,
    sigma: float,
) -> pd.DataFrame:
    """The candidates with `gain` and `gain_per_root_flop`, before any of them is run."""
    gains = _State(done, candidates, beliefs, target, sigma).gains()
    worth = gains / np.sqrt(floats(candidates, "flops"))
    return candidates.assign(gain=gains, gain_per_root_flop=worth / worth.max())


def half_width(
    done: pd.DataFrame, beliefs: Sequence[Belief], target: Quantity, sigma: float
) -> float:
    """95 % half-width of the target: sampling under each law, and half the spread of the laws."""
    return _State(done, done.iloc[:1], beliefs, target, sigma).half_width()


def _hold_out(candidates: pd.DataFrame, left: float) -> list[dict]:
    costs = floats(candidates, "flops")
    if not (costs <= left).any():
        return []
    # The largest run that is left to afford tests the law furthest out.
    index = int(np.where(costs <= left, costs, -np.inf).argmax())
    return [{"index": index, "role": "hold-out", "gain": np.nan, "half_width": np.nan}]


class _State:
    """Covariances of every draw of every law, kept as runs are added (Sherman and Morrison)."""

    def __init__(
        self,
        done: pd.DataFrame,
        candidates: pd.DataFrame,
        beliefs: Sequence[Belief],
        target: Quantity,
        sigma: float,
    ) -> None:
        self._noise = sigma**2
        self._parts = []
        values = []
        for belief in beliefs:
            value, gradient = target(belief)
            seen = log_loss_and_jacobian(belief.form.design(done), belief.theta)[1]
            ahead = log_loss_and_jacobian(belief.form.design(candidates), belief.theta)[1]
            precision = np.einsum("bnp,bnq->bpq", seen, seen) / self._noise
            # The prior keeps directions finite that the runs so far do not determine.
            covariance = np.linalg.inv(precision + np.eye(seen.shape[2]) / PRIOR**2)
            self._parts.append([gradient, ahead, covariance])
            values.append(float(value.mean()))
        # The spread of the laws does not shrink with runs; it limits how narrow the target gets.
        self._spread = max(values) - min(values)

    def gains(self) -> Array:
        """Share of the target's variance that each candidate removes, over draws and laws."""
        shares = []
        for gradient, ahead, covariance in self._parts:
            direction = np.einsum("bpq,bq->bp", covariance, gradient)
            shared = np.einsum("bcp,bp->bc", ahead, direction) ** 2
            own = np.einsum("bcp,bpq,bcq->bc", ahead, covariance, ahead, optimize=True)
            variance = np.einsum("bp,bp->b", gradient, direction)
            shares.append((shared / (self._noise + own) / variance[:, None]).mean(axis=0))
        return np.mean(shares, axis=0)

    def add(self, index: int) -> None:
        """Count a candidate as run."""
        for part in self._parts:
            _, ahead, covariance = part
            direction = np.einsum("bpq,bq->bp", covariance, ahead[:, index])
            scale = self._noise + np.einsum("bp,bp->b", ahead[:, index], direction)
            # Sherman and Morrison: one run is a rank-one change, no matrix is inverted again.
            change = np.einsum("bp,bq->bpq", direction, direction)
            part[2] = covariance - change / scale[:, None, None]

    def half_width(self) -> float:
        """As the module's `half_width`."""
        variances = [
            float(np.einsum("bp,bpq,bq->b", gradient, covariance, gradient).mean())
            for gradient, _, covariance in self._parts
        ]
        return float(NORMAL * np.sqrt(np.mean(variances) + (self._spread / 2) ** 2))
