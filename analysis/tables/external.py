"""External tables of runs (CSV, TSV, parquet, JSONL) read into one schema.

The result says which column was read as what, what was ignored and which rows were rejected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from analysis.tables.cells import flags, numbers, texts
from analysis.tables.column_matching import (
    UNNAMED_SET,
    ColumnSource,
    file_column,
    match_columns,
    schema_column,
)
from analysis.tables.compute import six_nd
from analysis.tables.files import listed, read_raw
from analysis.tables.frames import columns_of, floats, keep
from analysis.tables.schema import LOSS_UNITS, SCALES, SCHEMA

_LEAST = {"parameters": 1e3, "non_embedding_parameters": 1e2, "tokens": 1e3, "flops": 1e6}
_REJECTED = ["source_row", "column", "value", "reason"]


@dataclass(frozen=True)
class ExternalTable:
    """An external table in the schema.

    Attributes:
        rows: one row per (run, checkpoint, evaluation set); only columns that the file has.
        sources: schema column, or measure and evaluation set, to what it was read from.
        ignored: columns of the file that no column of the schema stands for.
        rejected: one line per row that was left out: `source_row`, `column`, `value`, `reason`.
        notes: what a reader should know about how the file was read.
    """

    rows: pd.DataFrame
    sources: dict[str, ColumnSource]
    ignored: tuple[str, ...]
    rejected: pd.DataFrame
    notes: tuple[str, ...]


def read_external(path: Path, columns: Mapping[str, str] | None = None) -> ExternalTable:
    """Read an external table of runs.

    Args:
        path: a .csv, .tsv, .parquet or .jsonl file.
        columns: schema column (or a synonym, such as N) to a column of the file, with `:unit`
            after it where its name does not say it, as in `{"N": "Size:B"}`.

    Raises:
        ValueError: the file cannot be read, lacks a loss, or leaves a column ambiguous.
    """
    raw = read_raw(path)
    chosen = {
        schema_column(target): file_column(raw, column)
        for target, column in (columns or {}).items()
    }
    sources, measures = match_columns(raw, chosen)
    if not measures:
        raise ValueError(
            f"{path} has no loss that could be recognised among {listed(raw.columns)}; name it "
            "with --columns loss=<column>"
        )
    bad: list[pd.DataFrame] = []
    identity = pd.DataFrame({"source_row": np.arange(1, len(raw) + 1)}, index=raw.index)
    for target, source in sources.items():
        identity[target] = _column(raw, target, source, bad)
    _check_magnitudes(identity, sources)
    rows = _long(raw, identity, measures, bad)
    rejected = _rejected(bad)
    rows = keep(rows, ~rows["source_row"].isin(rejected["source_row"]))
    if not len(rows):
        raise ValueError(f"no row of {path} is usable: {_first_reasons(rejected)}")
    used = {source.column for source in (*sources.values(), *measures.values())}
    ignored = tuple(str(name) for name in raw.columns if name not in used)
    rows, notes = _completed(rows)
    rows, doubled = _without_duplicates(rows, path)
    every = pd.concat([rejected, doubled], ignore_index=True)
    origins = {**sources, **{f"{kind} on {name}": s for (name, kind), s in measures.items()}}
    return ExternalTable(rows.reset_index(drop=True), origins, ignored, every, tuple(notes))


def _column(
    raw: pd.DataFrame, target: str, source: ColumnSource, bad: list[pd.DataFrame]
) -> pd.Series:
    cells, kind = cast("pd.Series", raw[source.column]), SCHEMA[target].kind
    if kind == "text":
        return texts(cells)
    if kind == "flag":
        parsed = flags(cells)
    elif kind in ("count", "flops"):
        if source.unit not in SCALES:
            raise ValueError(
                f"column {source.column!r} is in {source.unit!r}, which is no unit of {target}; "
                f"say one of {listed(filter(None, SCALES))} as --columns {target}=NAME:UNIT"
            )
        parsed = numbers(cells, SCALES[source.unit], positive=True)
    else:
        parsed = numbers(cells, 1.0, positive=False)
    _collect(bad, parsed, source.column, target)
    return parsed.values


def _collect(bad: list[pd.DataFrame], parsed, column: str, target: str) -> None:  # noqa: ANN001
    # A few odd cells cost their rows; where most are odd, the column was taken for the wrong one.
    share = len(parsed.bad) / max(int(parsed.known), 1)
    if len(parsed.bad) > 1 and share > 0.5:
        example = parsed.bad["value"].iloc[0]
        raise ValueError(
            f"column {column!r} was read as {target}, but most of its cells are not "
            f"({example!r}: {parsed.bad['reason'].iloc[0]}); map it with --columns"
        )
    if len(parsed.bad):
        bad.append(parsed.bad.assign(column=column))


def _check_magnitudes(rows: pd.DataFrame, sources: Mapping[str, ColumnSource]) -> None:
    """Counts without a unit that are too small to be counts: in millions, or logarithms?"""
    for name, least in _LEAST.items():
        if name not in rows or sources[name].unit:
            continue
        values = floats(rows, name)
        values = values[np.isfinite(values)]
        if len(values) and values.max() < least:
            column = sources[name].column
            raise ValueError(
                f"column {column!r} lies between {values.min():.3g} and {values.max():.3g}, too "
                f"small for {SCHEMA[name].meaning}; say its unit, as in --columns "
                f"{name}={column}:B, or export it without logarithm"
            )


def _long(
    raw: pd.DataFrame,
    identity: pd.DataFrame,
    measures: Mapping[tuple[str, str], ColumnSource],
    bad: list[pd.DataFrame],
) -> pd.DataFrame:
    """One row per evaluation set, with every measure of that set."""
    parts = []
    for set_name in dict.fromkeys(name for name, _ in measures):
        part = identity.copy()
        if "evaluation_set" not in part:
            part["evaluation_set"] = set_name
        for (name, target), source in measures.items():
            if name != set_name:
                continue
            parsed = numbers(cast("pd.Series", raw[source.column]), 1.0, positive=True)
            _collect(bad, parsed, source.column, target)
            part[target] = _in_unit(parsed.values, source)
        known = [target for target in ("loss_nats", "bits_per_byte") if target in part]
        parts.append(keep(part, part[known].notna().any(axis=1)))
    return pd.concat(parts, ignore_index=True)


def _in_unit(values: pd.Series, source: ColumnSource) -> pd.Series:
    kind = LOSS_UNITS.get(source.unit, "nats")
    if kind == "bits":
        return values * np.log(2.0)
    if kind == "ppl":
        return cast("pd.Series", np.log(values.where(values > 1)))
    return values


def _completed(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Add what follows by definition: a run id per row where there is none, and 6 N D."""
    notes = []
    rows = rows.copy()
    if "run_id" not in rows:
        rows["run_id"] = "row " + rows["source_row"].astype(str)
        notes.append("no column identifies the run: each row counts as its own run")
    if "trunk_id" not in rows:
        rows["trunk_id"] = rows["run_id"]
    if {"parameters", "tokens"} <= set(rows) and "flops_six_nd" not in rows:
        rows["flops_six_nd"] = six_nd(floats(rows, "parameters"), floats(rows, "tokens"))
    if "flops" not in rows:
        notes.append("no column of training FLOPs: 6 N D is used instead")
    if "decayed" not in rows:
        notes.append(
            "no column says whether schedules had ended: some losses may be read before the decay"
        )
    if UNNAMED_SET in set(rows["evaluation_set"]):
        notes.append("the evaluation set has no name: losses are not comparable with other tables")
    return columns_of(rows, [name for name in ("source_row", *SCHEMA) if name in rows]), notes


def _without_duplicates(rows: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Drop rows that repeat another one; rows of one place that disagree are an error."""
    place = [
        n for n in ("run_id", "step", "tokens", "evaluation_set", "seed", "order_seed") if n in rows
    ]
    if "step" not in rows and "tokens" not in rows:
        place += [name for name in ("parameters",) if name in rows]
    content = [name for name in rows if name != "source_row"]
    repeated = rows.duplicated(content)
    kept = keep(rows, ~repeated)
    # An unknown step or size may differ, so such rows are not a contradiction.
    clash = kept.duplicated(place, keep=False) & kept[place].notna().all(axis=1)
    if clash.any():
        lines = sorted(set(kept.loc[clash, "source_row"].head(4)))
        raise ValueError(
            f"{path}: rows {listed(lines)} share the same {', '.join(place)} but differ; add a "
            "column that tells them apart (step, seed), or remove all but one"
        )
    doubled = keep(rows, repeated)
    reason = "repeats an earlier row"
    records = [(int(row), "", "", reason) for row in doubled["source_row"]]
    return kept, pd.DataFrame(records, columns=pd.Index(_REJECTED))


def _rejected(bad: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not bad:
        return pd.DataFrame(columns=pd.Index(_REJECTED))
    rows = columns_of(pd.concat(bad, ignore_index=True), _REJECTED)
    return rows.sort_values(by=["source_row"], kind="stable")


def _first_reasons(rejected: pd.DataFrame) -> str:
    first = rejected.head(3).to_dict("records")
    return "; ".join(f"row {r['source_row']}, {r['column']}: {r['reason']}" for r in first)
