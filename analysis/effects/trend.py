"""How an effect changes with model size and with the token budget. Ours."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.effects.contrasts import Contrast
from analysis.inference.intervals import Interval, slope_and_error, slope_interval, t_interval
from analysis.tables.frames import floats, groups, means


@dataclass(frozen=True)
class Trend:
    """An effect over sizes and budgets, in percent of loss.

    Attributes:
        places: `rung`, `parameters`, `tokens` and `percent`, a row per size and budget.
        by_size: change per tenfold N [percentage points]; None for fewer than three sizes.
        by_budget: change per tenfold D within a size; None for one size or one budget.
    """

    places: pd.DataFrame
    by_size: Interval | None
    by_budget: Interval | None


def trend(contrast: Contrast) -> Trend:
    """The trend of a contrast; sizes are the independent observations of both slopes."""
    pairs = contrast.pairs
    cells = means(pairs, ["rung", "tokens"], ["difference", "parameters"]).reset_index()
    places = cells.assign(percent=100 * np.expm1(floats(cells, "difference")))
    places = places.sort_values(["parameters", "tokens"]).reset_index(drop=True)
    sizes = contrast.percent_by_size
    along = None
    if len(sizes) >= 3:
        decades = np.log10(floats(sizes, "parameters"))
        along = slope_interval(decades, floats(sizes, "percent"), f"{len(sizes)} sizes")
    slopes = [
        slope_and_error(np.log10(floats(cell, "tokens")), floats(cell, "percent"))[0]
        for _, cell in groups(places, ["rung"])
        if len(cell) > 1
    ]
    within = t_interval(np.array(slopes), "sizes") if len(slopes) > 1 else None
    return Trend(places, along, within if isinstance(within, Interval) else None)
