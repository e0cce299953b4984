"""The training loss along each run, thinned to what a small drawing can show."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from trainer.record import Row, StoredRun

CURVE_COLUMNS = ["run_id", "tokens", "loss_nats", "of_trunk"]
MOST_POINTS = 60


def training_curves(runs: Sequence[StoredRun], trunks: Sequence[StoredRun]) -> pd.DataFrame:
    """Rows of the runs' metrics, none changed, at most MOST_POINTS a run, with the first and last.

    A run that branched from a trunk begins with the trunk's steps before it (`of_trunk`). Steps
    whose loss was not finite are left out.
    """
    of_trunk = {trunk.path.name: trunk.metrics for trunk in trunks}
    parts = [_curve(run, of_trunk.get(str(run.provenance.get("trunk_id")), [])) for run in runs]
    records = [record for part in parts for record in part]
    frame = pd.DataFrame(records, columns=pd.Index(CURVE_COLUMNS))
    return frame.astype({"tokens": "float64", "loss_nats": "float64", "of_trunk": "bool"})


def _curve(run: StoredRun, trunk: list[Row]) -> list[tuple[str, float, float, bool]]:
    if not run.metrics:
        return []
    start = float(run.metrics[0]["tokens"] or 0)
    rows = [(row, True) for row in trunk if float(row["tokens"] or 0) < start]
    rows += [(row, False) for row in run.metrics]
    finite = [(row, before) for row, before in rows if row.get("loss_nats") is not None]
    places = np.unique(np.linspace(0, len(finite) - 1, min(len(finite), MOST_POINTS)).round())
    return [
        (run.path.name, float(row["tokens"] or 0), float(row["loss_nats"] or 0), before)
        for row, before in (finite[int(place)] for place in places)
    ]
