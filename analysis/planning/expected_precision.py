"""The precision to expect of a grid of runs before any of them is trained.

Fisher information of a law's parameters at assumed values (a local design, Chernoff 1953), with a
covariance in which points of one trunk share the random effect of their seed. The law, its
exponents and the noise are assumptions: `Assumed` holds them, and every answer prints them. Ours:
the noise model and the assumed values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import special, stats

from analysis.effects.contrasts import Contrast, contrasts
from analysis.effects.seed_noise import SeedNoise, seed_noise
from analysis.fitting.estimator import under_determined
from analysis.inference.intervals import t_quantile
from analysis.laws.bound import Form, bind, log_loss_and_jacobian
from analysis.laws.catalog import nested_family
from analysis.tables.frames import Array, groups, strings, where
from analysis.tables.run_table import SEEDS, Table
from analysis.validity.refusal import Refusal

CELL = ("architecture", "corpus")
TYPICAL = {"corpus": (4.0, 9.0), "architecture": (0.2, 4.0)}
"""Effects seen in public runs [% of loss]: between web corpora; recurrence against attention."""
POWER = 0.8
MEASURED_TOKENS = 311_000
"""Tokens of the evaluation set whose documents left the error that `PlannedNoise` assumes: that of
the default study, 39 documents."""


@dataclass(frozen=True)
class PlannedNoise:
    """Standard deviations of ln L.

    Attributes:
        seed: of seeds.
        point: of points of a trunk.
        by_size: of the effect of each factor, between sizes.
        evaluation: of an effect, from the documents of the evaluation set.
    """

    seed: float = 0.005
    point: float = 0.002
    by_size: Mapping[str, float] = field(
        default_factory=lambda: {"corpus": 0.005, "architecture": 0.005}
    )
    evaluation: float = 0.005


@dataclass(frozen=True)
class Assumed:
    """What the expected precision assumes.

    Attributes:
        shares: each term's share of the loss at the centre of the grid.
        exponents: alpha of N, beta of D.
    """

    shares: Mapping[str, float]
    exponents: Mapping[str, float]
    noise: PlannedNoise

    def theta(self, form: Form) -> Array:
        """The parameter vector of a Chinchilla law in a form's own coordinates."""
        values = {name: float(np.log(share)) for name, share in self.shares.items()}
        values |= dict(self.exponents)
        theta = np.zeros(len(form.labels))
        for (name, _), slot in form.slots.items():
            theta[slot] = values[name]
        return theta


USUAL = Assumed({"E": 0.5, "A": 0.25, "B": 0.25}, {"alpha": 0.34, "beta": 0.3}, PlannedNoise())
"""Exponents as published, a floor of half the loss, noise as in carefully tuned studies."""


@dataclass(frozen=True)
class Expected:
    """The expected precision of one quantity.

    Attributes:
        quantity: `alpha`, `beta`, `corpus` or `architecture`.
        half_width: of the 95 % interval; percent of loss for an effect.
        detectable: smallest effect detected with 80 % power [%]; None for an exponent.
    """

    quantity: str
    half_width: float | Refusal
    detectable: float | None = None

    @property
    def sentence(self) -> str:
        """The line in words."""
        if isinstance(self.half_width, Refusal):
            return f"{self.quantity}: will be refused ({self.half_width.reason})"
        if self.detectable is None:
            return f"{self.quantity}: 95 % interval of about +-{self.half_width:.2g}"
        text = f"{self.quantity} effect: about +-{self.half_width:.2g} % of loss"
        low, high = TYPICAL[self.quantity]
        verdict = "enough for effects as large as in public runs"
        if self.detectable > high:
            verdict = f"too little even for the largest in public runs ({high:g} %)"
        elif self.detectable > low:
            verdict = f"too little for the small ones in public runs ({low:g} %)"
        return f"{text}, detects {self.detectable:.2g} % with 80 % power: {verdict}"


def evaluation_error(tokens: int | None) -> float:
    """The standard error of an effect from the documents of a set of so many tokens.

    The error falls as the root of the number of documents, here of tokens: sets of shorter
    documents have less. None, for a set of unknown size, leaves the measured error.
    """
    measured = USUAL.noise.evaluation
    return measured if tokens is None else measured * (tokens / MEASURED_TOKENS) ** -0.5


def expect(grid: pd.DataFrame, assumed: Assumed) -> list[Expected]:
    """The precision that a grid leads to.

    Args:
        grid: planned points with `architecture`, `corpus`, `rung`, `seed`, `order_seed`,
            `trunk_id`, `parameters` and `tokens`.
        assumed: law and noise.
    """
    expected = []
    widths = exponent_widths(grid, assumed)
    for name in ("alpha", "beta"):
        expected.append(Expected(name, widths if isinstance(widths, Refusal) else widths[name]))
    for factor in ("corpus", "architecture"):
        expected.append(_contrast(grid, factor, assumed.noise))
    return expected


def exponent_widths(grid: pd.DataFrame, assumed: Assumed) -> dict[str, float] | Refusal:
    """Half-widths of the exponents under the law that a report fits to all cells at once."""
    law = nested_family(CELL)["Meab"]
    refusal = under_determined(grid.assign(loss_nats=1.0), law)
    if refusal is not None:
        return refusal
    form = bind(law, grid)
    jacobian = log_loss_and_jacobian(form.design(grid), assumed.theta(form)[None])[1][0]
    covariance = np.linalg.pinv(information(jacobian, strings(grid, "trunk_id"), assumed.noise))
    trunks = len(np.unique(strings(grid, "trunk_id")))
    # Trunks, not points, are independent.
    quantile = t_quantile(max(trunks - len(form.labels), 1))
    deviations = np.sqrt(np.diagonal(covariance))
    return {
        name: float(quantile * deviations[form.slots[name, form.groups[0]]])
        for name in ("alpha", "beta")
    }


def information(jacobian: Array, trunks: Array, noise: PlannedNoise) -> Array:
    """F' S^-1 F, where points of a trunk have covariance seed^2 and variance seed^2 + point^2."""
    point, seed = noise.point**2, noise.seed**2
    total = jacobian.T @ jacobian / point
    _, place = np.unique(trunks, return_inverse=True)
    for trunk in range(int(place.max()) + 1):
        mine = jacobian[place == trunk]
        # Woodbury: the inverse of point^2 I + seed^2 11'.
        shared = seed / (point * (point + len(mine) * seed))
        column = mine.sum(axis=0)
        total = total - shared * np.outer(column, column)
    return total


def _contrast(grid: pd.DataFrame, factor: str, noise: PlannedNoise) -> Expected:
    """What the paired comparison of the first two levels is expected to give, over sizes."""
    other = {"corpus": "architecture", "architecture": "corpus"}[factor]
    levels = list(dict.fromkeys(strings(grid, factor).tolist()))
    if len(levels) < 2:
        refusal = Refusal("R-FACTOR", f"a single {factor}", f"add a second {factor}")
        return Expected(factor, refusal)
    variances = []
    for _, rows in groups(grid, ["rung"]):
        sides = [
            rows.loc[strings(rows, factor) == level, [other, *SEEDS, "tokens"]]
            for level in levels[:2]
        ]
        pairs = sides[0].merge(sides[1], on=[other, *SEEDS, "tokens"])
        trunks = len(pairs[[other, *SEEDS]].drop_duplicates())
        if trunks:
            # A pair is a difference of two runs, so both variances count twice.
            between_seeds = 2 * (noise.seed**2 / trunks + noise.point**2 / len(pairs))
            variances.append(between_seeds + noise.by_size[factor] ** 2)
    sizes = len(variances)
    if sizes < 2:
        reason = f"matched pairs at {sizes} sizes"
        return Expected(factor, Refusal("R-PAIRS", reason, "plan more sizes"))
    between, shared = float(np.mean(variances) / sizes), noise.evaluation**2
    # Satterthwaite, as intervals do; documents are so many that their error counts as known.
    freedom = (sizes - 1) * (1 + shared / between) ** 2
    # An interval uses the sample deviation, which is smaller on average than the true one.
    usual = np.sqrt(between * _mean_over_deviation(sizes - 1) ** 2 + shared)
    # The effect whose t statistic exceeds the quantile with the wanted power; the central t stands
    # in for the noncentral one.
    smallest = np.sqrt(between + shared) * (t_quantile(freedom) + stats.t.ppf(POWER, freedom))
    half = t_quantile(freedom) * usual
    return Expected(factor, 100 * float(np.expm1(half)), 100 * float(np.expm1(smallest)))


def _mean_over_deviation(freedom: int) -> float:
    """Mean of a sample's standard deviation over the true one."""
    logs = special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2)
    return float(np.sqrt(2 / freedom) * np.exp(logs))


def measured_noise(points: Table) -> PlannedNoise | None:
    """The noise measured on the finished runs of a sweep; None while there are too few."""
    rows = where(points.rows, "evaluation_set", points.neutral_set)
    seeds = seed_noise(rows) if len(rows) else None
    if not isinstance(seeds, SeedNoise):
        return None
    seed_sd = seeds.sd.estimate
    by_size = {
        factor: _change_between_sizes(points, factor, seed_sd) for factor in USUAL.noise.by_size
    }
    shown = {factor: change for factor, change in by_size.items() if change is not None}
    if not shown:
        return None
    shared = [
        each.evaluation_error.error
        for factor in USUAL.noise.by_size
        for each in contrasts(points, factor, points.neutral_set)
        if isinstance(each, Contrast) and each.evaluation_error is not None
    ]
    evaluation = max(shared, default=USUAL.noise.evaluation)
    return PlannedNoise(seed_sd, USUAL.noise.point, {**USUAL.noise.by_size, **shown}, evaluation)


def _change_between_sizes(points: Table, factor: str, seed_sd: float) -> float | None:
    """Standard deviation of an effect between sizes, with the seed noise taken out."""
    scatters = [
        float(np.std(each.by_size.to_numpy(), ddof=1))
        for each in contrasts(points, factor, points.neutral_set)
        if isinstance(each, Contrast) and len(each.by_size) > 2
    ]
    # Pairs differ by two seeds: twice the seed variance is in the scatter.
    return float(np.sqrt(max(max(scatters) ** 2 - 2 * seed_sd**2, 0.0))) if scatters else None


def expectation_lines(grid: pd.DataFrame, assumed: Assumed) -> list[str]:
    """What to expect of a planned grid, for a terminal."""
    noise = assumed.noise
    changes = " and ".join(f"{100 * sd:.2g} % of the {x}'s" for x, sd in noise.by_size.items())
    assumes = noise == replace(USUAL.noise, evaluation=noise.evaluation)
    source = "assumed" if assumes else "from finished runs, law assumed"
    lines = ["Expected precision, from assumptions (not a measurement):"]
    lines += [f"  {each.sentence}" for each in expect(grid, assumed)]
    lines.append(
        f"  noise {source}: sd of ln L {100 * noise.seed:.2g} % of seeds, {changes} "
        f"effect between sizes, {100 * noise.evaluation:.2g} % of an effect from the documents of "
        f"the evaluation set; alpha {assumed.exponents['alpha']:g}, beta "
        f"{assumed.exponents['beta']:g}, a floor of {assumed.shares['E']:.0%} of the loss"
    )
    return lines
