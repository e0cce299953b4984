"""How well a sweep used its machine: each run's share of the GEMM peak, and its seconds."""

import numpy as np
import pandas as pd

from trainer.record import StoredRun

USE_COLUMNS = [
    "run_id",
    "architecture",
    "gemm_peak_share",
    "training_seconds",
    "evaluation_seconds",
]


def machine_use(runs: list[StoredRun]) -> pd.DataFrame:
    """One row per record, trunks and probes included; what it does not hold is empty."""
    return pd.DataFrame([_of(run) for run in runs], columns=pd.Index(USE_COLUMNS))


def _of(run: StoredRun) -> dict[str, object]:
    shares = [row.get("gemm_peak_share") for row in run.metrics]
    known = [float(share) for share in shares if share is not None]
    # The rows of one set at one step, of its blocks at milestones and of all, share one clock.
    evaluated: dict[tuple, float] = {}
    for row in run.evaluations:
        place = (row.get("step"), row.get("evaluation_set"), row.get("evaluation_id"))
        seconds = float(row.get("evaluation_seconds") or 0)
        evaluated[place] = max(evaluated.get(place, 0.0), seconds)
    return {
        "run_id": run.path.name,
        "architecture": run.config.get("architecture"),
        "gemm_peak_share": float(np.median(known)) if known else np.nan,
        "training_seconds": sum(float(row.get("step_seconds") or 0) for row in run.metrics),
        "evaluation_seconds": sum(evaluated.values()),
    }
