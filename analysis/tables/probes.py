"""Tuning probes of a study: each beside the run that it is compared with.

A probe is trained like one run of the study but for its learning rate or its batch, so that the
report can say what the study's own choice costs. It is no row of the study.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.tables.frames import floats, keep, strings, where
from trainer.record import StoredRun

FACTORS = ("learning_rate_factor", "batch_factor")
PROBE_COLUMNS = [
    "run_id", "status", "architecture", "rung", "corpus", "seed", "order_seed", "parameters",
    "horizon_tokens", "learning_rate", "batch_tokens", *FACTORS, "loss_nats", "compared_with",
    "loss_in_use",
]  # fmt: skip
MATCHED = ["architecture", "rung", "corpus", "seed", "order_seed"]
"""What a probe has in common with the run that it is compared with, beside its horizon."""


def read_factors(stored: object, file: str) -> dict[str, dict[str, float]]:
    """The probes that a sweep lists: folder -> factor on the learning rate, factor on the batch.

    Raises:
        ValueError: they are not listed so.
    """
    listed = {} if stored is None else stored
    try:
        if not isinstance(listed, Mapping):
            raise TypeError("not a mapping")
        found = {
            str(name): {factor: float(each[factor]) for factor in FACTORS}
            for name, each in listed.items()
        }
        if not all(0 < value < math.inf for each in found.values() for value in each.values()):
            raise TypeError("a factor that is not above 0")
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} lists its probes in a way that cannot be read ({error}); expand the sweep "
            "again to rewrite it"
        ) from error
    return found


def probe_frame(
    probes: list[StoredRun],
    factors: Mapping[str, Mapping[str, float]],
    rows: pd.DataFrame,
    runs: pd.DataFrame,
    neutral_set: str,
) -> pd.DataFrame:
    """One row per probe that the sweep lists, whatever its state; see PROBE_COLUMNS.

    Args:
        probes: as stored.
        factors: of each of them.
        rows: evaluated points of the probes and of the study's runs.
        runs: one row for each of both, with its state.
        neutral_set: that losses are read on.
    """
    decayed = rows["decayed"].astype(bool) & (rows["status"] == "done")
    final = where(keep(rows, decayed & (rows["subset"] != True)), "evaluation_set", neutral_set)  # noqa: E712
    losses = dict(zip(strings(final, "run_id"), floats(final, "loss_nats"), strict=True))
    batches = dict(zip(strings(final, "run_id"), floats(final, "batch_tokens"), strict=True))
    own = keep(runs, ~runs["run_id"].isin(list(factors)))
    records = []
    for run in probes:
        name = run.path.name
        row = where(runs, "run_id", name).iloc[0].to_dict()
        batch = run.config.get("optimizer", {}).get("batch_tokens")
        partner = _partner(row, own, batches, batch)
        records.append(
            {
                **row,
                **factors[name],
                "batch_tokens": batch,
                "loss_nats": losses.get(name, np.nan),
                "compared_with": partner,
                "loss_in_use": losses.get(partner, np.nan),
            }
        )
    frame = pd.DataFrame(records, columns=pd.Index(PROBE_COLUMNS))
    numbers = ["learning_rate", "batch_tokens", *FACTORS, "loss_nats", "loss_in_use"]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def _partner(
    probe: dict, runs: pd.DataFrame, batches: Mapping[str, float], batch: float | None
) -> str:
    """The run of the study that a probe is compared with; empty if there is none."""
    mine = runs
    for name in MATCHED:
        mine = where(mine, name, probe[name])
    if not len(mine) or batch is None:
        return ""
    away = np.abs(floats(mine, "horizon_tokens") - float(probe["horizon_tokens"]))
    nearest = int(away.argmin())
    name = str(mine["run_id"].iloc[nearest])
    # Horizons are whole batches, so those of another batch may differ by less than one.
    return name if away[nearest] < max(batch, batches.get(name, 0.0)) else ""
