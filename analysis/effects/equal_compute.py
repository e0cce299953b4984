"""An architecture effect at equal training FLOPs, interpolated along the baseline's horizons.

Ours: the baseline's loss is interpolated by a parabola in logs and never extrapolated, so that no
law is assumed.
"""

import numpy as np
import pandas as pd

from analysis.effects.contrasts import Contrast, summarise
from analysis.tables.frames import keep, where
from analysis.tables.run_table import SEEDS
from analysis.validity.refusal import Refusal

_HELD = ["corpus", "rung", *SEEDS]


def at_equal_flops(rows: pd.DataFrame, contrast: Contrast, convention: str) -> Contrast | Refusal:
    """The architecture effect at equal training FLOPs.

    The baseline's ln L is interpolated in ln FLOPs along its horizons (a parabola through the
    nearest three, as a chord lies above a convex curve), never beyond them. The documents of the
    evaluation set leave the same error as on the contrast at equal tokens.
    """
    levels = (contrast.baseline, contrast.other)
    pairs = []
    for place in rows[_HELD].drop_duplicates().itertuples(index=False):
        here = keep(rows, (rows[_HELD] == list(place)).all(axis=1))
        sides = [where(here, "architecture", level).sort_values(convention) for level in levels]
        pairs += _interpolated_pairs(sides[0], sides[1], convention)
    if not pairs:
        return Refusal(
            "R-REACH",
            "no size has both arms at equal FLOPs inside their horizons",
            "add horizons so that the arms' ranges of FLOPs overlap",
        )
    return summarise(
        "architecture", levels, contrast.evaluation_set, pd.DataFrame(pairs), contrast.influence
    )


def _interpolated_pairs(
    baseline: pd.DataFrame, other: pd.DataFrame, convention: str
) -> list[dict[str, object]]:
    if len(baseline) < 2:
        return []
    known = np.log(baseline[[convention, "loss_nats"]].to_numpy(dtype=np.float64))
    pairs = []
    for row in other.to_dict("records"):
        at = np.log(row[convention])
        if not known[0, 0] <= at <= known[-1, 0]:
            continue
        # With two horizons the parabola is a chord.
        near = known[np.argsort(np.abs(known[:, 0] - at))[:3]]
        # Abscissas are relative to `at`, so the fitted value there is the constant coefficient.
        curve = np.polyfit(near[:, 0] - at, near[:, 1], len(near) - 1)
        loss = float(np.exp(curve[-1]))
        pairs.append(
            {
                **{name: row[name] for name in _HELD},
                "tokens": row["tokens"],
                "parameters": row["parameters"],
                "difference": float(np.log(row["loss_nats"] / loss)),
                "nats": row["loss_nats"] - loss,
                "same_samples": False,
            }
        )
    return pairs
