"""Cells of an external table as numbers, flags or text; unknown and rejected cells apart."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd

from analysis.tables.schema import SCALES

UNKNOWN = frozenset({"", "na", "n/a", "nan", "none", "null", "-", "--", "?", "unknown", "<na>"})
_TRUE, _FALSE = (
    frozenset({"true", "yes", "y", "1", "1.0"}),
    frozenset({"false", "no", "n", "0", "0.0"}),
)
_NUMBER = (
    r"^([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:_\d+)*\.?\d*|\.\d+)(?:e[+-]?\d+)?"
    r"|[+-]?inf(?:inity)?)\s*([kmbgt]?)$"
)


@dataclass(frozen=True)
class Cells:
    """A column in its type.

    Attributes:
        values: float64; not a number where unknown or refused.
        bad: refused cells: `source_row` (from 1), `value` and `reason`.
        known: cells that hold something.
    """

    values: pd.Series
    bad: pd.DataFrame
    known: int


def numbers(cells: pd.Series, scale: float, *, positive: bool) -> Cells:
    """Cells as float64 in units of one; `1.4B`, `300M` and `1,000` are understood."""
    words = _words(cells)
    known = ~words.isin(UNKNOWN)
    parts = words.str.extract(_NUMBER)
    digits = parts[0].str.replace(r"[,_]", "", regex=True)
    values = cast("pd.Series", pd.to_numeric(digits, errors="coerce")).astype(np.float64)
    values = values * parts[1].fillna("").map(SCALES).astype(np.float64) * scale
    reasons = pd.Series("", index=cells.index, dtype=object)
    reasons[known & values.isna()] = "not a number"
    reasons[known & np.isinf(values)] = "not finite"
    if positive:
        reasons[known & (values < 0)] = (
            "negative: an int64 product that overflowed, or a wrong sign"
        )
        reasons[known & (values == 0)] = "zero; leave the cell empty if the value is unknown"
    return _cells(values, words, reasons, known)


def flags(cells: pd.Series) -> Cells:
    """Cells as 1, 0 or unknown."""
    words = _words(cells)
    known = ~words.isin(UNKNOWN)
    values = pd.Series(np.nan, index=cells.index)
    values[words.isin(_TRUE)], values[words.isin(_FALSE)] = 1.0, 0.0
    reasons = pd.Series("", index=cells.index, dtype=object)
    reasons[known & values.isna()] = "neither true nor false"
    return _cells(values, words, reasons, known)


def texts(cells: pd.Series) -> pd.Series:
    """Cells as text, None where unknown."""
    text = cells.astype(str).str.strip()
    unknown = cells.isna() | text.str.lower().isin(UNKNOWN)
    return cast("pd.Series", text.astype(object).where(~unknown, None))


def _words(cells: pd.Series) -> pd.Series:
    text = cells.astype(str).str.strip().str.lower()
    return cast("pd.Series", text.where(~cells.isna(), ""))


def _cells(values: pd.Series, words: pd.Series, reasons: pd.Series, known: pd.Series) -> Cells:
    refused = reasons != ""
    bad = pd.DataFrame(
        {
            "source_row": np.flatnonzero(refused.to_numpy()) + 1,
            "value": [str(word)[:40] for word in words[refused]],
            "reason": list(reasons[refused]),
        }
    )
    return Cells(values.where(~refused), bad, int(known.sum()))
