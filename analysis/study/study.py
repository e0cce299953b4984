"""The analysis of a sweep, computed once: fits, intervals, effects, curves."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.answer import Answer, answer, refused_arm
from analysis.effects.contrasts import Contrast, every_set
from analysis.effects.learning_rates import rate_search
from analysis.effects.multipliers import Multiplier, compute_multiplier, data_multiplier, frontier
from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.bootstrap import Bootstrap, parameter_intervals, replicate
from analysis.inference.intervals import Interval
from analysis.inference.model_selection import Choice, choose
from analysis.laws.catalog import CHINCHILLA, POWER, nested_family
from analysis.laws.law import Law, group_of
from analysis.tables.frames import floats, keep, where
from analysis.tables.run_region import run_region
from analysis.tables.run_table import Table, final
from analysis.validity.refusal import Refusal

CELL = ("architecture", "corpus")
JOINT = "Meab"
CURVE = 60
UNCHOSEN = Choice(pd.DataFrame(), {}, None, None)


@dataclass(frozen=True)
class Settings:
    """How much work goes into the intervals, and the seed of their random numbers."""

    replicates: int = 400
    seed: int = 0


@dataclass(frozen=True)
class FittedLaw:
    """One law on one part of the table, with an interval for each parameter."""

    part: str
    evaluation_set: str
    law: Law
    fit: Fit | Refusal
    intervals: dict[str, Interval | Refusal]
    replicates: Bootstrap | None


@dataclass(frozen=True)
class Study:
    """The analysis of a sweep; figures and report read it and compute nothing.

    Attributes:
        points: the table with nothing but decayed points of finished runs.
        rate_search: why this sweep cannot compare architectures, if it is a search over learning
            rates; None for any other sweep.
        effects: evaluation set -> factor -> contrasts, the neutral set first.
        cells: a separate Chinchilla law per architecture, corpus and evaluation set.
        choice: the nested family on the neutral set, scored; `family` its AICc alone.
        joint: one law over all cells of the neutral set that share nothing but exponents; set
            beforehand, as a law picked by its fit to the same points has intervals too short.
        power: per cell of the neutral set, the power law in compute where Chinchilla is refused.
        alternatives: the joint law's exponents under other estimators.
        curves: fitted losses along frontiers, horizons and sizes.
    """

    table: Table
    points: Table
    rate_search: Refusal | None
    answer: Answer
    effects: dict[str, dict[str, tuple[Contrast | Refusal, ...]]]
    cells: tuple[FittedLaw, ...]
    choice: Choice
    family: pd.DataFrame
    joint: FittedLaw
    power: tuple[FittedLaw, ...]
    alternatives: pd.DataFrame
    multipliers: tuple[Multiplier | Refusal, ...]
    curves: pd.DataFrame

    @property
    def laws(self) -> tuple[FittedLaw, ...]:
        """Every law that was tried, the joint one first."""
        return (self.joint, *self.power, *self.cells)


def analyse(table: Table, settings: Settings) -> Study:
    """Fit and compare everything a table supports; what it does not support becomes a refusal."""
    search = rate_search(table)
    if search is not None:
        return _refused(table, search)
    # One stream for all bootstraps below: another order of them would give other intervals.
    generator = np.random.default_rng(settings.seed)
    points = final(table)
    neutral = where(points.rows, "evaluation_set", table.neutral_set)
    laws = nested_family(CELL)
    choice = choose(neutral, laws) if len(neutral) else UNCHOSEN
    joint = _fitted("all cells", neutral, laws[JOINT], (settings.replicates, generator))
    cells = tuple(
        _fitted(f"{architecture} on {corpus}", rows, CHINCHILLA, (settings.replicates, generator))
        for (architecture, corpus, _), rows in _parts(points)
    )
    return Study(
        table=table,
        points=points,
        rate_search=None,
        answer=answer(points, table.neutral_set),
        effects=every_set(points),
        cells=cells,
        choice=choice,
        family=_family(choice, laws),
        joint=joint,
        power=tuple(_power(points, joint, (settings.replicates, generator))),
        alternatives=_alternatives(neutral, joint),
        multipliers=tuple(_multipliers(points, joint)),
        curves=_curves(joint, [law for law in cells if law.evaluation_set == table.neutral_set]),
    )


def _refused(table: Table, refusal: Refusal) -> Study:
    """A study that keeps its points and answers nothing."""
    points, law = final(table), nested_family(CELL)[JOINT]
    joint = FittedLaw("all cells", table.neutral_set, law, refusal, {}, None)
    return Study(
        table=table,
        points=points,
        rate_search=refusal,
        answer=Answer(
            evaluation_set=table.neutral_set,
            corpus=(refusal,),
            arms=(refused_arm(refusal),),
            noise=refusal,
            detectable={"corpus": refusal, "architecture": refusal},
        ),
        effects={table.neutral_set: {"corpus": (refusal,), "architecture": (refusal,)}},
        cells=(),
        choice=UNCHOSEN,
        family=_family(UNCHOSEN, {}),
        joint=joint,
        power=(),
        alternatives=_alternatives(points.rows, joint),
        multipliers=(refusal,),
        curves=_curves(joint, []),
    )


def _parts(points: Table) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    for set_name in sorted(
        points.rows["evaluation_set"].unique(), key=lambda name: (name != points.neutral_set, name)
    ):
        for architecture in points.levels("architecture"):
            for corpus in points.levels("corpus"):
                arm = where(points.rows, "architecture", architecture)
                rows = where(where(arm, "corpus", corpus), "evaluation_set", set_name)
                if len(rows):
                    yield (architecture, corpus, str(set_name)), rows


def _power(
    points: Table, joint: FittedLaw, random: tuple[int, np.random.Generator]
) -> Iterator[FittedLaw]:
    if isinstance(joint.fit, Fit):
        return
    for (architecture, corpus, set_name), rows in _parts(points):
        if set_name == points.neutral_set:
            yield _fitted(f"{architecture} on {corpus}", rows, POWER, random)


def _fitted(
    part: str, rows: pd.DataFrame, law: Law, random: tuple[int, np.random.Generator]
) -> FittedLaw:
    fit = Estimator().fit(rows, law)
    set_name = str(rows["evaluation_set"].iloc[0]) if len(rows) else ""
    if isinstance(fit, Refusal):
        return FittedLaw(part, set_name, law, fit, {}, None)
    replicates = replicate(fit, *random)
    intervals = parameter_intervals(fit, replicates)
    return FittedLaw(part, set_name, law, fit, intervals, replicates)


def _family(choice: Choice, laws: dict[str, Law]) -> pd.DataFrame:
    """What each nested law lets differ, its AICc by least squares, or why it is refused."""
    shown = choice.table.reindex(columns=["law", "parameters", "AICc", "status"])
    shown.insert(1, "differs between cells", [_differs(laws[name]) for name in shown["law"]])
    return shown


def _differs(law: Law) -> str:
    return ", ".join(sorted(law.varies)) or "nothing"


def _alternatives(rows: pd.DataFrame, joint: FittedLaw) -> pd.DataFrame:
    records = []
    if isinstance(joint.fit, Fit):
        for name, delta in {"delta 0.001": 1e-3, "least squares": np.inf}.items():
            refit = Estimator(delta=delta).fit(rows, joint.law)
            if isinstance(refit, Fit):
                records += [(name, label, value) for label, value in refit.parameters.items()]
        default = f"default, delta {joint.fit.delta:.2g}"
        records += [(default, label, value) for label, value in joint.fit.parameters.items()]
    return pd.DataFrame(records, columns=pd.Index(["estimator", "parameter", "value"]))


def _multipliers(points: Table, joint: FittedLaw) -> Iterator[Multiplier | Refusal]:
    """One factor is changed at a time, the other held at each of its levels."""
    if isinstance(joint.fit, Refusal) or joint.replicates is None:
        yield joint.fit if isinstance(joint.fit, Refusal) else Refusal("R-EMPTY", "", "")
        return
    architectures, corpora = points.levels("architecture"), points.levels("corpus")
    pairs = [
        (f"{architectures[0]} on {corpus}", f"{other} on {corpus}")
        for other in architectures[1:]
        for corpus in corpora
    ] + [
        (f"{architecture} on {corpora[0]}", f"{architecture} on {other}")
        for other in corpora[1:]
        for architecture in architectures
    ]
    for baseline, other in pairs:
        if {baseline, other} <= set(joint.fit.form.groups):
            yield data_multiplier(joint.fit, joint.replicates, baseline, other)
            yield compute_multiplier(joint.fit, joint.replicates, baseline, other)


def _curves(joint: FittedLaw, cells: list[FittedLaw]) -> pd.DataFrame:
    """Curves of the joint law, or of the separate laws where there is no joint one."""
    if isinstance(joint.fit, Fit):
        parts = [_arm_curves(joint.fit, group) for group in joint.fit.form.groups]
    else:
        parts = [_arm_curves(law.fit, "") for law in cells if isinstance(law.fit, Fit)]
    columns = ["kind", "architecture", "corpus", "key", "parameters", "tokens", "flops"]
    empty = pd.DataFrame(columns=pd.Index([*columns, "loss_nats"]))
    return pd.concat(parts, ignore_index=True) if parts else empty


def _arm_curves(fit: Fit, group: str) -> pd.DataFrame:
    labels = np.array(group_of(fit.rows, CELL))
    rows = keep(fit.rows, labels == group) if group else fit.rows
    arm = run_region(rows)
    identity = {"architecture": rows["architecture"].iloc[0], "corpus": rows["corpus"].iloc[0]}
    sizes, tokens = arm.grid(), np.geomspace(*arm.tokens, CURVE)
    parts = [frontier(fit, group).assign(kind="frontier", key=0.0)]
    for horizon in np.unique(floats(rows, "tokens")):
        at = sizes[arm.was_run(sizes, np.full(len(sizes), horizon))]
        if len(at):
            parts.append(_line(fit, identity, at, np.full(len(at), horizon), "horizon"))
    for size in arm.parameters:
        of_size = np.full(CURVE, size)
        seen = arm.was_run(of_size, tokens)
        parts.append(_line(fit, identity, of_size[seen], tokens[seen], "size"))
    curve = pd.concat([part.assign(**identity) for part in parts], ignore_index=True)
    # Frontiers come with their compute; the other curves get that of the arm's cost.
    missing = curve["flops"].isna()
    costs = arm.cost(curve["parameters"].to_numpy(dtype=np.float64)) * curve["tokens"]
    return curve.assign(flops=curve["flops"].where(~missing, costs))


def _line(
    fit: Fit, identity: dict[str, str], sizes: np.ndarray, tokens: np.ndarray, kind: str
) -> pd.DataFrame:
    line = pd.DataFrame({"parameters": sizes, "tokens": tokens}).assign(**identity)
    key = sizes[0] if kind == "size" else tokens[0]
    return line.assign(kind=kind, key=key, flops=np.nan, loss_nats=fit.predict(line))
