"""The numbers behind the figures beyond those of a study; figures compute nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.compute_optimal.frontier import (
    arm_of,
    best_sizes,
    budget_warnings,
    contours,
    frontier_with_band,
    optimal_sizes,
)
from analysis.compute_optimal.isoflop import IsoFlopCurve, budgets
from analysis.compute_optimal.sensitivity import cooldown, counting, multipliers_by_scale
from analysis.effects.loss_to_loss import Transfer, transfers
from analysis.effects.tuning import unchecked
from analysis.effects.variance_shares import Decomposition, decompositions
from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.backtest import RIVALS, BackTest, backtest
from analysis.inference.bootstrap import Bootstrap, replicate
from analysis.inference.profile_likelihood import Profile, profile
from analysis.laws.catalog import CHINCHILLA, GAMMA
from analysis.laws.law import Law
from analysis.planning.next_runs import Advice, Belief, Terms, advise, design_map, loss_at
from analysis.study.headline import Headline, headline
from analysis.study.study import FittedLaw, Settings, Study
from analysis.tables.frames import floats, strings, where
from analysis.tables.run_table import Table, has_evidence
from analysis.validity.checks import check
from analysis.validity.extrapolation import LARGEST_EXTRAPOLATION
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

CANDIDATES = 24
PROPOSALS = 5
DRAWS = 16


@dataclass(frozen=True)
class Findings:
    """What the figures show beyond the study itself; frames may be empty.

    Attributes:
        reservations: every warning about the decayed points.
        frontiers: fitted frontiers to ten times the largest compute, with bands.
        isoflop: architecture -> its isoFLOP curves on the first corpus.
        optima: N*(C) and D*(C) of the fitted law.
        tested: rolling forecasts by each law in the form of `shown`.
        shown: the joint law, or else the first cell's: behind contours, profiles, design map.
        options: the design map over (N, D); `advice` the runs proposed on it.
    """

    reservations: tuple[Caveat, ...]
    headline: Headline
    shares: dict[str, Decomposition | Refusal]
    transfers: dict[str, Transfer | Refusal]
    frontiers: pd.DataFrame
    isoflop: dict[str, list[IsoFlopCurve]]
    optima: pd.DataFrame
    tested: dict[str, BackTest]
    shown: FittedLaw | None
    contours: pd.DataFrame
    profiles: tuple[Profile, ...]
    by_scale: pd.DataFrame
    counting: pd.DataFrame
    cooldown: pd.DataFrame
    options: pd.DataFrame
    advice: Advice | None


def find(study: Study, settings: Settings) -> Findings:
    """Compute everything; what a study cannot support stays empty."""
    generator = np.random.default_rng(settings.seed + 1)
    points, neutral = (
        study.points,
        where(study.points.rows, "evaluation_set", study.table.neutral_set),
    )
    shown = _shown(study)
    tested = _tested(shown)
    options, advice = _design(shown, generator)
    curves, rivals = _isoflop(study, neutral), _rivals(study.joint.fit)
    joint = study.joint.fit
    return Findings(
        reservations=(
            *reservations(study.table, points),
            *_of_tuning(study),
            *_of_budgets(study, curves),
        ),
        headline=headline(study),
        shares=decompositions(points, settings.replicates, generator),
        transfers=transfers(points, settings.replicates, generator),
        frontiers=_per_group(
            study, lambda f, r, g: frontier_with_band(f, r, g, _rate(tested), rivals)
        ),
        isoflop=curves,
        optima=_per_group(study, optimal_sizes),
        tested=tested,
        shown=shown,
        contours=_contours(shown),
        profiles=_profiles(shown),
        by_scale=_by_scale(study),
        counting=_counting(neutral, joint, generator) if isinstance(joint, Fit) else pd.DataFrame(),
        cooldown=cooldown(study.table),
        options=options,
        advice=advice,
    )


def reservations(table: Table, points: Table) -> tuple[Caveat, ...]:
    """Warnings about the decayed points, with the evidence on tuning that the sweep states."""
    rows = points.rows
    if not len(rows):
        return ()
    tuned = {name: float(has_evidence(each)) for name, each in table.tuning.items()}
    if tuned:
        known = [tuned.get(name, np.nan) for name in strings(rows, "architecture").tolist()]
        rows = rows.assign(learning_rate_tuned=known)
    return check(rows.assign(horizon_tokens=np.nan))


def _of_tuning(study: Study) -> tuple[Caveat, ...]:
    """W-TUNING, in a study that compares architectures."""
    caveat = unchecked(study.answer.gaps)
    several = len(study.table.levels("architecture")) > 1 and len(study.points.rows) > 0
    return (caveat,) if caveat is not None and several else ()


def _shown(study: Study) -> FittedLaw | None:
    if isinstance(study.joint.fit, Fit):
        return study.joint
    for law in study.cells:
        if law.evaluation_set == study.table.neutral_set and isinstance(law.fit, Fit):
            return law
    return None


def _tested(shown: FittedLaw | None) -> dict[str, BackTest]:
    if shown is None or not isinstance(shown.fit, Fit):
        return {}
    return {
        law.name: backtest(Estimator(starts=4), shown.fit.rows, _like(law, shown.fit))
        for law in RIVALS
    }


def _rivals(joint: Fit | Refusal) -> list[Fit]:
    """The other laws fitted to the same rows: their spread shows how much the choice matters."""
    if isinstance(joint, Refusal):
        return []
    fits = [Estimator(starts=4).fit(joint.rows, _like(law, joint)) for law in RIVALS]
    return [each for each in fits if isinstance(each, Fit) and each.law.name != joint.law.name]


def _like(law: Law, fit: Fit) -> Law:
    """A rival law whose coefficients differ between the same groups."""
    return replace(law, by=fit.law.by, varies=fit.law.varies & set(law.parameters))


def _rate(tested: dict[str, BackTest]) -> BackTest:
    return tested[CHINCHILLA.name]


def _per_group(study: Study, make: Callable[[Fit, Bootstrap, str], pd.DataFrame]) -> pd.DataFrame:
    fit, replicates = study.joint.fit, study.joint.replicates
    if not isinstance(fit, Fit) or replicates is None or _shown(study) is None:
        return pd.DataFrame()
    return pd.concat([make(fit, replicates, g) for g in fit.form.groups], ignore_index=True)


def _isoflop(study: Study, neutral: pd.DataFrame) -> dict[str, list[IsoFlopCurve]]:
    by_architecture = {}
    for name in study.table.levels("architecture"):
        arm = where(neutral, "architecture", name)
        first = [c for c in study.table.levels("corpus") if c in set(arm["corpus"])][:1]
        curves = budgets(where(arm, "corpus", first[0])) if first else []
        if curves:
            by_architecture[name] = curves
    return by_architecture


def _of_budgets(study: Study, curves: dict[str, list[IsoFlopCurve]]) -> tuple[Caveat, ...]:
    """W-EDGE, W-A2BIAS and W-SUM over all isoFLOP curves, one warning a code."""
    by_code: dict[str, list[str]] = {}
    for name, mine in curves.items():
        law = next(
            (each.fit for each in study.cells if each.part.startswith(f"{name} on ")
             and each.evaluation_set == study.table.neutral_set), None,
        )  # fmt: skip
        for caveat in budget_warnings(mine, law if isinstance(law, Fit) else None):
            by_code.setdefault(caveat.code, []).append(f"{name}: {caveat.finding}")
    return tuple(Caveat(code, _first_of(each)) for code, each in by_code.items())


def _first_of(findings: list[str], shown: int = 2) -> str:
    """Findings of many budgets: the first of them, and how many more."""
    left = len(findings) - shown
    more = [f"and {left} more like them"] if left > 0 else []
    return "; ".join([*findings[:shown], *more])


def _contours(shown: FittedLaw | None) -> pd.DataFrame:
    if shown is None or not isinstance(shown.fit, Fit):
        return pd.DataFrame()
    return contours(shown.fit, shown.fit.form.groups[0])


def _profiles(shown: FittedLaw | None) -> tuple[Profile, ...]:
    if shown is None or not isinstance(shown.fit, Fit):
        return ()
    shared = [label for label in shown.fit.form.labels if "[" not in label]
    return tuple(profile(shown.fit, label) for label in shared)


def _by_scale(study: Study) -> pd.DataFrame:
    fit, replicates = study.joint.fit, study.joint.replicates
    if not isinstance(fit, Fit) or replicates is None:
        return pd.DataFrame()
    architectures, corpora = study.table.levels("architecture"), study.table.levels("corpus")
    pairs = [
        (f"{architectures[0]} on {corpora[0]}", f"{a} on {corpora[0]}") for a in architectures[1:]
    ]
    pairs += [
        (f"{architectures[0]} on {corpora[0]}", f"{architectures[0]} on {c}") for c in corpora[1:]
    ]
    known = set(fit.form.groups)
    return multipliers_by_scale(fit, replicates, [pair for pair in pairs if set(pair) <= known])


def _counting(neutral: pd.DataFrame, joint: Fit, generator: np.random.Generator) -> pd.DataFrame:
    return counting(neutral, joint, 100, generator)


def _design(
    shown: FittedLaw | None, generator: np.random.Generator
) -> tuple[pd.DataFrame, Advice | None]:
    """What to run next to know the loss at ten times the compute, for the cell that is shown."""
    if shown is None or not isinstance(shown.fit, Fit):
        return pd.DataFrame(), None
    fit = shown.fit
    beliefs = _beliefs(fit, generator)
    arm = arm_of(fit, fit.form.groups[0])
    done, target = fit.rows.reset_index(drop=True), _target(fit)
    sizes, ratios = floats(done, "parameters"), floats(done, "tokens") / floats(done, "parameters")
    n, m = (
        each.ravel()
        for each in np.meshgrid(
            np.geomspace(sizes.min(), sizes.max() * 3, CANDIDATES),
            np.geomspace(ratios.min(), ratios.max(), CANDIDATES),
        )
    )
    options = pd.DataFrame({"parameters": n, "tokens": n * m, "flops": arm.cost(n) * n * m})
    options = options.assign(**arm.identity)
    sigma = max(fit.sigma, 1e-4)
    # Budget: three of the largest candidates, a third of it for the run that is held out.
    terms = Terms(sigma, 3.0 * float(floats(options, "flops").max()), 0.0, PROPOSALS, 1 / 3)
    mapped = design_map(done, options, beliefs, target, sigma)
    return mapped, advise(done, options, beliefs, target, terms)


def _target(fit: Fit) -> Callable:
    arm = arm_of(fit, fit.form.groups[0])
    compute = np.array([float(floats(arm.rows, "flops").max()) * LARGEST_EXTRAPOLATION])
    size = np.exp(best_sizes(fit, fit.theta[None], arm, compute).logs[0])
    tokens = compute / arm.cost(size)
    point = pd.DataFrame({"parameters": size, "tokens": tokens, "flops": compute})
    return loss_at(point.assign(**arm.identity))


def _beliefs(fit: Fit, generator: np.random.Generator) -> list[Belief]:
    results = [fit, Estimator(starts=4).fit(fit.rows, _like(GAMMA, fit))]
    # Two laws with different tails, so that the advice does not rest on one of them.
    fits = [each for each in results if isinstance(each, Fit)]
    return [Belief(each.form, replicate(each, DRAWS, generator).theta) for each in fits]
