"""A leaderboard of architectures: each arm's loss against baselines, by more than seed noise.

Student's t with a standard deviation pooled over the seeds of all arms in a setting. Ours: an arm
beats a baseline if the interval of their difference lies below zero, without a correction for the
number of comparisons.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.inference.intervals import Interval, t_quantile
from analysis.tables.frames import floats, keep, means, where
from analysis.tables.run_table import SEEDS, Table, final

LEAST_ARMS = 3
IDENTITY = "identity"
CONTEXTS = {1_024: "1k", 8_192: "8k", 65_536: "64k"}
BEATS, TIES, WORSE = "beats", "does not beat", "does not beat, is worse"


@dataclass(frozen=True)
class Setting:
    """What the compared arms share: corpus, rung and the longest horizon finished there."""

    corpus: str
    rung: str
    tokens: float


@dataclass(frozen=True)
class ArmResult:
    """One architecture in one setting.

    Attributes:
        seeds: loss of each seed [nats per token].
        loss: mean over seeds; with an interval only if some arm was run with two seeds.
        against: baseline -> difference of loss to it, likewise.
    """

    architecture: str
    parameters: float
    seeds: np.ndarray
    loss: Interval
    against: dict[str, Interval]
    training_flops_per_token: float
    tokens_per_second: float
    state_bytes: dict[int, float]


@dataclass(frozen=True)
class Comparison:
    """All arms of one setting, the best first.

    Attributes:
        lines: baseline -> its loss [nats per token].
        pooled_sd: standard deviation between seeds, pooled over the arms; NaN without repeats.
        freedom: degrees of freedom of it.
        notes: what was left out, and why.
    """

    place: Setting
    arms: tuple[ArmResult, ...]
    lines: dict[str, float]
    pooled_sd: float
    freedom: int
    line_tokens: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_arms(table: Table) -> tuple[Comparison, ...]:
    """Every corpus and rung at which arms can be compared.

    Not for a search over learning rates: its arms differ in more than the architecture. A sweep of
    two architectures is compared pair by pair elsewhere, unless it is one size beside baselines.
    """
    few = len(table.levels("architecture")) < LEAST_ARMS
    if few and (not len(table.baselines) or len(table.levels("rung")) > 1):
        return ()
    rows = where(final(table).rows, "evaluation_set", table.neutral_set)
    return tuple(_compared(table, place, mine) for place, mine in _places(table, rows))


def verdict(difference: Interval) -> str:
    """Whether an arm beats a baseline by more than the seed noise; empty without an interval."""
    if not np.isfinite(difference.low):
        return ""
    if difference.high < 0:
        return BEATS
    return WORSE if difference.low > 0 else TIES


def arms_table(comparisons: tuple[Comparison, ...]) -> pd.DataFrame:
    """One row per arm and setting, in numbers."""
    return pd.DataFrame(
        [_record(comparison, arm) for comparison in comparisons for arm in comparison.arms]
    )


def _places(table: Table, rows: pd.DataFrame) -> Iterator[tuple[Setting, pd.DataFrame]]:
    for corpus in table.levels("corpus"):
        for rung in table.levels("rung"):
            mine = where(where(rows, "corpus", corpus), "rung", rung)
            if len(mine):
                # The longest horizon that any arm finished; arms without it are left out here.
                horizon = float(floats(mine, "horizon_tokens").max())
                yield Setting(corpus, rung, horizon), where(mine, "horizon_tokens", horizon)


def _compared(table: Table, place: Setting, rows: pd.DataFrame) -> Comparison:
    seeds = {
        name: floats(means(mine, SEEDS, ["loss_nats"]), "loss_nats")
        for name in table.levels("architecture")
        if len(mine := where(rows, "architecture", name))
    }
    sd, freedom = pooled_sd(seeds)
    models, line_tokens, notes = _models(table, place, rows)
    lines = ({IDENTITY: float(seeds[IDENTITY].mean())} if IDENTITY in seeds else {}) | models
    arms = [
        ArmResult(
            architecture=name,
            parameters=float(floats(mine, "parameters")[0]),
            seeds=losses,
            loss=_interval(float(losses.mean()), sd * np.sqrt(1 / len(losses)), freedom),
            against={
                line: _interval(
                    float(losses.mean()) - value,
                    # The seeds of an arm scatter; n-grams are counted and do not.
                    sd * np.sqrt(1 / len(losses) + (1 / len(seeds[line]) if line in seeds else 0)),
                    freedom,
                )
                for line, value in lines.items()
                if line != name
            },
            training_flops_per_token=float((mine["flops"] / mine["tokens"]).iloc[0]),
            tokens_per_second=_speed(table.runs, mine),
            state_bytes=_states(table.ladder, name, place.rung),
        )
        for name, losses in seeds.items()
        for mine in [where(rows, "architecture", name)]
    ]
    ordered = tuple(sorted(arms, key=lambda arm: arm.loss.estimate))
    return Comparison(place, ordered, lines, sd, freedom, line_tokens, notes)


def pooled_sd(groups: Mapping[str, np.ndarray]) -> tuple[float, int]:
    """Standard deviation pooled over groups, and its degrees of freedom; NaN without repeats."""
    freedom = sum(len(values) - 1 for values in groups.values())
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups.values())
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (float("nan"), 0)


def _models(
    table: Table, place: Setting, rows: pd.DataFrame
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Losses of the n-gram models that were evaluated on the same targets as the runs."""
    baselines = where(
        where(table.baselines, "corpus", place.corpus), "evaluation_set", table.neutral_set
    )
    targets = set(floats(rows, "targets"))
    lines, counted, notes = {}, {}, ()
    for order, nats, count, tokens in sorted(
        zip(
            *(floats(baselines, c) for c in ("order", "total_nats", "targets", "tokens")),
            strict=True,
        )
    ):
        if targets != {count}:
            notes = ("N-gram models evaluated on other targets than the runs are not shown.",)
            continue
        name = {1: "unigram", 2: "bigram"}.get(int(order), f"{order:.0f}-gram")
        lines[name], counted[name] = nats / count, tokens
    return lines, counted, notes


def _interval(estimate: float, error: float, freedom: int) -> Interval:
    half = t_quantile(freedom) * error if freedom else float("nan")
    method = f"pooled t interval, {freedom} degrees of freedom" if freedom else "one seed"
    return Interval(estimate, estimate - half, estimate + half, method)


def _speed(runs: pd.DataFrame, rows: pd.DataFrame) -> float:
    mine = keep(runs, runs["run_id"].isin(rows["run_id"]))
    speeds = floats(mine, "tokens_per_second")
    known = speeds[np.isfinite(speeds)]
    return float(np.median(known)) if len(known) else float("nan")


def _states(ladder: pd.DataFrame, architecture: str, rung: str) -> dict[int, float]:
    mine = where(where(ladder, "architecture", architecture), "rung", rung)
    known = dict(zip(floats(mine, "seq_len"), floats(mine, "state_bytes"), strict=True))
    return {context: known[context] for context in CONTEXTS if context in known}


def _record(comparison: Comparison, arm: ArmResult) -> dict[str, object]:
    place = comparison.place
    differences: dict[str, object] = {}
    for name in comparison.lines:
        difference = arm.against.get(name)
        if difference is not None:
            differences |= {
                f"minus_{name}_nats": difference.estimate,
                f"minus_{name}_low": difference.low,
                f"minus_{name}_high": difference.high,
                f"verdict_{name}": verdict(difference),
            }
    return {
        "corpus": place.corpus,
        "rung": place.rung,
        "tokens": place.tokens,
        "architecture": arm.architecture,
        "seeds": len(arm.seeds),
        "parameters": arm.parameters,
        "loss_nats": arm.loss.estimate,
        "low": arm.loss.low,
        "high": arm.loss.high,
        "own_seed_sd": float(np.std(arm.seeds, ddof=1)) if len(arm.seeds) > 1 else np.nan,
        "pooled_seed_sd": comparison.pooled_sd,
        "degrees_of_freedom": comparison.freedom,
        **differences,
        "training_flops_per_token": arm.training_flops_per_token,
        "tokens_per_second_median": arm.tokens_per_second,
        **{f"state_bytes_{label}": arm.state_bytes.get(c) for c, label in CONTEXTS.items()},
    }
