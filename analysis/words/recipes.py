"""The table of training recipes as a reader sees it."""

import numpy as np
import pandas as pd

from analysis.words.numbers import with_unit


def recipes_shown(effects: pd.DataFrame) -> pd.DataFrame:
    """Digits that the intervals support, units in the head."""
    return pd.DataFrame(
        {
            "corpus": row["corpus"],
            "rung": row["rung"],
            "tokens": with_unit(row["horizon_tokens"]),
            "architecture": row["architecture"],
            "recipe": row["recipe"],
            "seeds": str(row["seeds"]),
            "change of the loss [%]": _change(row),
        }
        for row in effects.to_dict("records")
    )


def _change(row: dict) -> str:
    if not np.isfinite(row["low"]):
        return f"{row['percent']:+.2f}"
    return f"{row['percent']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
