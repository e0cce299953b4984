"""Checks of a table before any law is fitted, one function a warning code.

A check reads rows in the columns of `analysis.tables.schema` and returns a warning or None. It
never changes a number: the warning is printed next to the result. Ours, from errors that changed
published fits; the thresholds are conventions.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.tables.compute import six_nd
from analysis.tables.frames import floats, groups, keep, means, strings
from analysis.validity.warnings import Caveat

SMALL_MODEL = 1e8
COUNT_TOLERANCE = 0.10
COUNTER_RANGE = (0.5, 2.0)
ROUGH_RANGE = (0.1, 10.0)
"""C over 6 N D: without the architecture's own count only a factor of ten is surely a slip."""
SUM_TOLERANCE = 0.05


def check(rows: pd.DataFrame) -> tuple[Caveat, ...]:
    """Run every check on a table; the warnings in the order of WARNINGS."""
    checks: tuple[Callable[[pd.DataFrame], Caveat | None], ...] = (
        rates, decay, counting, clusters, tokenizers, lossy, evaluation, repetition, seeds, units,
    )  # fmt: skip
    return tuple(caveat for caveat in (each(rows) for each in checks) if caveat is not None)


def rates(rows: pd.DataFrame) -> Caveat | None:
    """W-LR: an arm's learning rate was not searched, or the best one is at the edge of the search.

    A cell that was trained at three rates or more is a search; its best must be bracketed.
    """
    unknown, edges = [], []
    for (name,), arm in groups(rows, ["architecture"]) if "architecture" in rows else ():
        tuned = _known(arm, "learning_rate_tuned")
        searched, at_edge = _searches(arm)
        edges += [f"{name}: {at_edge} of {searched} searches" for _ in range(at_edge > 0)]
        if not searched and not (len(tuned) == len(arm) and bool(tuned.all())):
            unknown.append(str(name))
    if edges:
        return Caveat("W-LR", f"the best rate is the last one tried in {'; '.join(edges)}")
    if unknown:
        return Caveat("W-LR", f"no search is on record for {', '.join(unknown)}")
    return None


def _searches(arm: pd.DataFrame) -> tuple[int, int]:
    """Cells with three rates or more, and those of them whose best rate is the last one."""
    cell = [n for n in ("corpus", "parameters", "tokens", "evaluation_set") if n in arm]
    if "learning_rate" not in arm or not cell:
        return 0, 0
    searched = at_edge = 0
    for _, part in groups(keep(arm, arm["learning_rate"].notna()), cell):
        average = means(part, ["learning_rate"], ["loss_nats"]).sort_index()
        # Two rates cannot bracket an optimum.
        if len(average) >= 3:
            searched += 1
            at_edge += int(floats(average, "loss_nats").argmin()) in (0, len(average) - 1)
    return searched, at_edge


def decay(rows: pd.DataFrame) -> Caveat | None:
    """W-DECAY: some losses were read before the learning rate had decayed."""
    unfinished = np.zeros(len(rows), dtype=bool)
    if "decayed" in rows:
        unfinished |= (rows["decayed"].notna() & (rows["decayed"].astype(float) == 0)).to_numpy()
    for reached, horizon in (("step", "horizon_steps"), ("tokens", "horizon_tokens")):
        if {reached, horizon} <= set(rows):
            # A thousandth of slack: the last step rounds the horizon to whole batches.
            unfinished |= floats(rows, reached) < 0.999 * floats(rows, horizon)
    if not unfinished.any():
        return None
    mixed = "all" if unfinished.all() else f"{int(unfinished.sum())} of {len(rows)}"
    return Caveat("W-DECAY", f"{mixed} points were read before the end of their schedule")


def counting(rows: pd.DataFrame) -> Caveat | None:
    """W-COUNT: N without embeddings for small models, or exact FLOPs far from 6 N D."""
    if not len(_known(rows, "parameters")):
        if "non_embedding_parameters" in rows:
            sizes = floats(rows, "non_embedding_parameters")
            if np.nanmin(sizes) < SMALL_MODEL:
                return Caveat("W-COUNT", "only N without embeddings is known, below 1e8")
        return None
    if not {"flops", "tokens"} <= set(rows):
        return None
    ratio = floats(rows, "flops") / six_nd(floats(rows, "parameters"), floats(rows, "tokens"))
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio) or np.abs(np.log(ratio)).max() <= np.log1p(COUNT_TOLERANCE):
        return None
    return Caveat("W-COUNT", f"C is {ratio.min():.2f} to {ratio.max():.2f} of 6 N D")


def clusters(rows: pd.DataFrame) -> Caveat | None:
    """W-CLUSTER: a run or trunk gives several points of one evaluation set."""
    owner = "trunk_id" if "trunk_id" in rows else "run_id"
    if owner not in rows:
        return None
    keys = [owner, *(name for name in ("evaluation_set",) if name in rows)]
    most = max((len(part) for _, part in groups(rows, keys)), default=0)
    if most < 2:
        return None
    return Caveat("W-CLUSTER", f"up to {most} points of one {owner[:-3]}")


def tokenizers(rows: pd.DataFrame) -> Caveat | None:
    """W-TOK: the table mixes losses per token of different tokenizers."""
    levels = _levels(rows, "tokenizer") or _levels(rows, "vocab_size")
    return Caveat("W-TOK", f"{len(levels)}: {_some(levels)}") if len(levels) > 1 else None


def lossy(rows: pd.DataFrame) -> Caveat | None:
    """W-LOSSY: some tokenizers may change the text, so their bytes are not those of the text."""
    found = [name for name in _levels(rows, "tokenizer") if name.startswith("lossy_file")]
    return Caveat("W-LOSSY", _some(found)) if found else None


def evaluation(rows: pd.DataFrame) -> Caveat | None:
    """W-EVAL: a single evaluation set, or one that a corpus was made for."""
    sets = _levels(rows, "evaluation_set")
    # A corpus evaluated on its own kind of text has an advantage that is no better data.
    own = {name.lower() for name in sets} & {name.lower() for name in _levels(rows, "corpus")}
    if own:
        return Caveat("W-EVAL", f"{_some(sorted(own))} is a training corpus as well")
    return (
        Caveat("W-EVAL", f"one set: {_some(sets) or 'without a name'}") if len(sets) < 2 else None
    )


def repetition(rows: pd.DataFrame) -> Caveat | None:
    """W-REPEAT: more tokens were seen than there are distinct ones, in all or of one domain."""
    ratio = np.full(len(rows), np.nan)
    if {"tokens", "unique_tokens"} <= set(rows):
        ratio = floats(rows, "tokens") / floats(rows, "unique_tokens")
    if "domain_repeats" in rows:
        ratio = np.fmax(ratio, floats(rows, "domain_repeats"))
    repeated = ratio > 1.001
    if not repeated.any():
        return None
    return Caveat(
        "W-REPEAT", f"{int(repeated.sum())} rows, up to {ratio[repeated].max():.3g} times"
    )


def seeds(rows: pd.DataFrame) -> Caveat | None:
    """W-SEED: no configuration was trained with two seeds, or they change the weights alone."""
    cell = [n for n in ("architecture", "corpus", "parameters", "tokens") if n in rows]
    if "seed" not in rows or not cell or not _vary(rows, cell, "seed"):
        return Caveat("W-SEED", "no two rows differ by seed alone")
    if "order_seed" in rows and not _vary(rows, cell, "order_seed"):
        return Caveat("W-SEED", "seeds change the initial weights alone, not the order of samples")
    return None


def _vary(rows: pd.DataFrame, cell: list[str], seed: str) -> bool:
    """Whether some cell has two values of a seed."""
    # Evaluation sets and checkpoints repeat a seed without repeating the training.
    return bool(rows.drop_duplicates([*cell, seed]).duplicated(cell).any())


def units(rows: pd.DataFrame) -> Caveat | None:
    """W-UNIT: a loss above a uniform guess, hardly any data, or FLOPs far from their count."""
    slips = []
    if {"loss_nats", "vocab_size"} <= set(rows):
        # ln V is the loss of a uniform guess: above it the unit is bits, or not per token.
        worse = floats(rows, "loss_nats") > np.log(floats(rows, "vocab_size"))
        slips += [f"{int(worse.sum())} losses above ln V" for _ in range(bool(worse.any()))]
    if {"parameters", "tokens"} <= set(rows):
        few = floats(rows, "tokens") < floats(rows, "parameters") / 100
        slips += [f"{int(few.sum())} rows with D < N/100" for _ in range(bool(few.any()))]
    off = _off_count(rows)
    slips += [f"{off} rows with FLOPs far from their count" for _ in range(off > 0)]
    return Caveat("W-UNIT", "; ".join(slips)) if slips else None


def _off_count(rows: pd.DataFrame) -> int:
    """Rows whose C is out of range of the architecture's counter, or of 6 N D without one."""
    if "flops" not in rows:
        return 0
    if "flops_counted" in rows:
        ratio, (low, high) = floats(rows, "flops") / floats(rows, "flops_counted"), COUNTER_RANGE
    elif {"parameters", "tokens"} <= set(rows):
        counted = six_nd(floats(rows, "parameters"), floats(rows, "tokens"))
        ratio, (low, high) = floats(rows, "flops") / counted, ROUGH_RANGE
    else:
        return 0
    return int(((ratio < low) | (ratio > high)).sum())


def exponent_sum(size_exponent: float, token_exponent: float, implied: float) -> Caveat | None:
    """W-SUM: N*(C) ~ C^a and D*(C) ~ C^b whose a + b is not what the FLOP counter implies.

    Args:
        size_exponent: a.
        token_exponent: b.
        implied: a + b along the counter's frontier: 1 for C = 6 N D.
    """
    total = size_exponent + token_exponent
    if abs(total - implied) <= SUM_TOLERANCE + 1e-12:
        return None
    return Caveat("W-SUM", f"a + b = {total:.3f}, the counter implies {implied:.3f}")


def _known(rows: pd.DataFrame, column: str) -> np.ndarray:
    if column not in rows:
        return np.zeros(0)
    return floats(keep(rows, rows[column].notna()), column)


def _levels(rows: pd.DataFrame, column: str) -> list[str]:
    if column not in rows:
        return []
    return sorted(set(strings(keep(rows, rows[column].notna()), column).tolist()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
