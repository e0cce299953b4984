"""Typed reads of data frames, where pandas itself cannot say what it returns."""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pandas as pd


def where(rows: pd.DataFrame, column: str, level: object) -> pd.DataFrame:
    """The rows whose column has this level."""
    return cast("pd.DataFrame", rows.loc[rows[column] == level])


def keep(rows: pd.DataFrame, mask: object) -> pd.DataFrame:
    """The rows where a mask, an array or a series of booleans, is true."""
    return cast("pd.DataFrame", rows.loc[np.asarray(mask, dtype=bool)])


def columns_of(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Some columns, in this order."""
    return cast("pd.DataFrame", rows[list(names)])


def floats(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64: FLOP counts exceed 2**63 in large studies."""
    return rows[column].to_numpy(dtype=np.float64)


def means(rows: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Mean of columns per group, groups in the order of their first row."""
    return cast("pd.DataFrame", rows.groupby(list(by), sort=False)[list(columns)].mean())


def strings(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column as an array of text."""
    return rows[column].to_numpy(dtype=str)


def groups(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """The rows of each combination of levels, in the order of their first row."""
    for key, part in rows.groupby(list(by), sort=False):
        yield cast("tuple", key), part


Array = np.ndarray
