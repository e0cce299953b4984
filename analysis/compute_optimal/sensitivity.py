"""Sensitivity of the answers to scale, to how N and C are counted, and to learning-rate decay.

How N and C are counted moves the exponent of N*(C): Pearce and Song 2406.12907; Porian et al.
2406.19146. Ours: the same runs fitted again under each way of counting, and the loss after decay
against that of the undecayed trunk at the same tokens.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.compute_optimal.frontier import size_exponent
from analysis.fitting.estimator import Estimator, Fit
from analysis.inference.bootstrap import Bootstrap, replicate
from analysis.inference.intervals import Interval
from analysis.laws.law import group_of
from analysis.tables.frames import Array, floats, groups, keep, where
from analysis.tables.run_region import run_region
from analysis.tables.run_table import FLOP_CONVENTIONS, Table, along_training
from analysis.validity.refusal import Refusal

SIZE_COUNTS = {"parameters": "all parameters", "non_embedding_parameters": "without embeddings"}
SCALE = 25
COUNT_COLUMNS = ["parameters counted", "FLOPs counted", "exponent", "low", "high"]
SCALE_COLUMNS = ["baseline", "other", "parameters", "factor", "low", "high", "refused"]


def multipliers_by_scale(
    fit: Fit, replicates: Bootstrap, pairs: list[tuple[str, str]]
) -> pd.DataFrame:
    """The iso-loss data multiplier at each size, or why it is refused there.

    At each size the other arm is taken at the middle of its tokens. A point is refused where the
    baseline cannot reach that loss in more than one replicate of twenty, or only with tokens that
    it was not run with.
    """
    records = [row for pair in pairs for row in _by_scale(fit, replicates, pair)]
    return pd.DataFrame(records, columns=pd.Index(SCALE_COLUMNS))


def _by_scale(fit: Fit, replicates: Bootstrap, pair: tuple[str, str]) -> Iterator[tuple]:
    labels = np.array(group_of(fit.rows, fit.law.by))
    arms = {name: run_region(keep(fit.rows, labels == name)) for name in pair}
    baseline, other = pair
    low = max(arm.parameters[0] for arm in arms.values())
    high = min(arm.parameters[-1] for arm in arms.values())
    tokens = float(np.exp(np.log(arms[other].tokens).mean()))
    for size in np.geomspace(low, high, SCALE):
        point, drawn = (
            _log_multiplier(fit, theta, pair, (float(size), tokens))
            for theta in (fit.theta[None], replicates.theta)
        )
        needed = float(np.exp(point[0])) * tokens if np.isfinite(point[0]) else np.inf
        inside = bool(arms[baseline].was_run(np.array([size]), np.array([needed]))[0])
        interval = replicates.interval(float(point[0]), drawn) if inside else None
        if isinstance(interval, Interval):
            ends = np.exp([interval.estimate, interval.low, interval.high])
            yield (baseline, other, size, *ends, "")
        else:
            reason = interval.reason if isinstance(interval, Refusal) else "outside the runs"
            yield (baseline, other, size, np.nan, np.nan, np.nan, reason)


def _log_multiplier(
    fit: Fit, theta: Array, pair: tuple[str, str], place: tuple[float, float]
) -> Array:
    """Ln of the iso-loss data multiplier; infinite where the baseline's floor lies above."""
    size, tokens = place
    baseline, other = (fit.surface(name, theta) for name in pair)
    needed = baseline.tokens(size, other.loss(size, tokens))[:, 0]
    return np.log(needed) - np.log(tokens)


def counting(
    rows: pd.DataFrame, joint: Fit, count: int, generator: np.random.Generator
) -> pd.DataFrame:
    """Exponent of N*(C) of the first arm under each way of counting N and C.

    Args:
        rows: decayed points of the neutral set.
        joint: the law whose form is fitted again to the other counts.
        count: bootstrap replicates.
        generator: of the bootstrap.
    """
    records = []
    for size_count, words in SIZE_COUNTS.items():
        counted = rows.assign(parameters=floats(rows, size_count))
        refit = Estimator(delta=joint.delta, starts=6).fit(counted, joint.law)
        if isinstance(refit, Refusal):
            continue
        replicates = replicate(refit, count, generator)
        for convention, meaning in FLOP_CONVENTIONS.items():
            exponent = size_exponent(refit, replicates, refit.form.groups[0], convention)
            if not np.isfinite(exponent.value):
                continue
            interval = replicates.interval(exponent.value, exponent.drawn)
            if isinstance(interval, Interval):
                ends = (exponent.value, interval.low, interval.high)
                records.append((words, meaning, *ends))
    return pd.DataFrame(records, columns=pd.Index(COUNT_COLUMNS))


def cooldown(table: Table) -> pd.DataFrame:
    """Loss of each point after decay, and of its trunk at the same tokens before decay.

    The trunk's ln L is interpolated in ln D, never beyond its own points.
    """
    rows = where(along_training(table), "evaluation_set", table.neutral_set)
    undecayed = keep(rows, ~rows["decayed"].astype(bool))
    done = keep(rows, rows["decayed"].astype(bool) & (rows["status"] == "done"))
    records = []
    for (trunk,), points in groups(done, ["trunk_id"]):
        line = where(undecayed, "trunk_id", trunk).sort_values("tokens")
        if len(line) < 2:
            continue
        known, losses = np.log(floats(line, "tokens")), np.log(floats(line, "loss_nats"))
        for row in points.to_dict("records"):
            at = np.log(row["tokens"])
            if known[0] <= at <= known[-1]:
                before = float(np.exp(np.interp(at, known, losses)))
                records.append(
                    (row["architecture"], row["corpus"], row["parameters"], row["tokens"],
                     before, row["loss_nats"], 100 * np.log(row["loss_nats"] / before))
                )  # fmt: skip
    columns = ["architecture", "corpus", "parameters", "tokens", "before", "after", "percent"]
    return pd.DataFrame(records, columns=pd.Index(columns))
