"""What a training recipe changes: its loss against the architecture's under the sweep's own recipe.

Runs of one seed share initial weights and samples, so differences are taken seed by seed. Student's
t with a standard deviation of differences pooled over the recipes of a place, as in the
leaderboard.
"""

import numpy as np
import pandas as pd

from analysis.effects.leaderboard import pooled_sd
from analysis.inference.intervals import t_quantile
from analysis.tables.frames import floats, groups, where
from analysis.tables.run_table import SEEDS, Table, final

PLACE = ("corpus", "rung", "horizon_tokens")
COLUMNS = (
    *PLACE, "architecture", "recipe", "seeds", "percent", "low", "high", "degrees_of_freedom",
)  # fmt: skip


def recipe_effects(table: Table) -> pd.DataFrame:
    """One row per place, architecture and recipe: the change of loss, in percent."""
    rows = where(final(table).rows, "evaluation_set", table.neutral_set)
    records = []
    for place, mine in groups(rows, PLACE):
        changes = {
            arm: differences
            for arm, own in table.recipes.items()
            if len(differences := _by_seed(mine, arm, own))
        }
        sd, freedom = pooled_sd(changes)
        for arm, differences in changes.items():
            middle, count = float(differences.mean()), len(differences)
            half = t_quantile(freedom) * sd / np.sqrt(count) if freedom else np.nan
            own = table.recipes[arm]
            name = arm.removeprefix(own).strip()
            # Logarithms until here: a change up and one down by the same factor cancel.
            low, percent, high = (100 * np.expm1([middle - half, middle, middle + half])).tolist()
            records.append((*place, own, name, count, percent, low, high, freedom))
    return pd.DataFrame(records, columns=pd.Index(COLUMNS))


def _by_seed(rows: pd.DataFrame, arm: str, own: str) -> np.ndarray:
    """The difference of ln loss of each seed that both arms were trained with."""
    sides = [where(rows, "architecture", name)[[*SEEDS, "loss_nats"]] for name in (arm, own)]
    pairs = sides[0].merge(sides[1], on=SEEDS, suffixes=("", "_own"))
    return np.log(floats(pairs, "loss_nats")) - np.log(floats(pairs, "loss_nats_own"))
