"""Which column of an external table is which column of the schema, and in which unit.

A name is recognised by its synonyms in `analysis.tables.schema`, a loss by its measure, with the
evaluation set before it. Two columns that could both be meant are an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.tables.files import listed
from analysis.tables.schema import LOSS_UNITS, SCALES, SCHEMA, plain, split_unit, target_of

UNNAMED_SET = "unnamed"
_MEASURES = "loss|nll|cross[ _]?entropy|bpb|bits[ _]per[ _]byte|ppl|perplexity"
_MEASURE = re.compile(
    rf"^(?P<set>.*?)[\s_\-./]*\b(?:(?:validation|valid|val|eval|test|heldout)[\s_\-./]*)?"
    rf"(?P<measure>{_MEASURES})$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ColumnSource:
    """Where a column of the schema comes from: a column of the file, in a unit."""

    column: str
    unit: str


def parse_columns(text: str) -> dict[str, str]:
    """The mapping behind `--columns N=Size,tokens=Tokens:B`.

    Raises:
        ValueError: a part is not `name=column`.
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, column = part.partition("=")
        if not equals or not name.strip() or not column.strip():
            raise ValueError(f"--columns {part!r} is not of the form N=Size or N=Size:B")
        if name.strip() in mapping:
            raise ValueError(f"--columns names {name.strip()} twice; keep one of them")
        mapping[name.strip()] = column.strip()
    return mapping


def schema_column(target: str) -> str:
    """The column of the schema that a name or synonym stands for.

    Raises:
        ValueError: there is none.
    """
    match = target_of(target)
    if match is None:
        raise ValueError(f"--columns {target}: no such column in the schema; {listed(SCHEMA)}")
    return match[0]


def file_column(raw: pd.DataFrame, column: str) -> ColumnSource:
    """A column of the file, with the unit after the last colon or in the name."""
    names = set(raw.columns)
    if column in names:
        return ColumnSource(column, _unit_in(column))
    stem, colon, unit = column.rpartition(":")
    if colon and stem in names and plain(unit) in {*SCALES, *LOSS_UNITS}:
        return ColumnSource(stem, plain(unit))
    raise ValueError(f"--columns names {column!r}, but the file has {listed(raw.columns)}")


def match_columns(
    raw: pd.DataFrame, chosen: dict[str, ColumnSource]
) -> tuple[dict[str, ColumnSource], dict[tuple[str, str], ColumnSource]]:
    """Which column of the file is which column of the schema; losses by set and measure."""
    candidates: dict[str, list[ColumnSource]] = {}
    measures: dict[tuple[str, str], list[ColumnSource]] = {}
    taken = {source.column for source in chosen.values()}
    given_losses = {name for name in chosen if SCHEMA[name].kind == "loss"}
    for column in (str(name) for name in raw.columns if name not in taken):
        match = target_of(column)
        measure = _measure(column)
        if match is not None and SCHEMA[match[0]].kind != "loss":
            if match[0] not in chosen:
                candidates.setdefault(match[0], []).append(ColumnSource(column, match[1]))
        elif measure is not None and not given_losses:
            set_name, kind, unit = measure
            measures.setdefault((set_name, kind), []).append(ColumnSource(column, unit))
    sources = {name: _only(raw, name, several) for name, several in candidates.items()}
    sources |= {name: source for name, source in chosen.items() if name not in given_losses}
    losses = {key: _only(raw, f"{key[1]} on {key[0]}", each) for key, each in measures.items()}
    losses |= {(_set_in(chosen[name].column), name): chosen[name] for name in sorted(given_losses)}
    named = [set_name for set_name, _ in losses if set_name != UNNAMED_SET]
    if "evaluation_set" in sources and named:
        raise ValueError(
            f"both the column {sources['evaluation_set'].column!r} and the names of columns "
            f"({listed(named)}) name the evaluation set; choose one loss with --columns loss=..."
        )
    return sources, losses


def _measure(column: str) -> tuple[str, str, str] | None:
    """Evaluation set, schema column and unit of a loss column, or None."""
    stem = re.sub(r"[\[(][^\])]*[\])]\s*$", "", column).strip()
    unit = split_unit(column, "loss")[1] if stem != column else ""
    if stem == column:
        for suffix in LOSS_UNITS:
            if re.search(rf"loss[_ ]{suffix}$", column, re.IGNORECASE):
                stem, unit = column[: -len(suffix) - 1], suffix
    if plain(stem) == "l":
        return UNNAMED_SET, "loss_nats", unit
    match = _MEASURE.match(stem.strip())
    if match is None:
        return None
    kind = LOSS_UNITS.get(plain(match["measure"]), LOSS_UNITS.get(unit, "nats"))
    target = "bits_per_byte" if kind == "bpb" else "loss_nats"
    name = match["set"].strip(" _-./")
    return ("" if plain(name) == "final" else name) or UNNAMED_SET, target, kind


def _set_in(column: str) -> str:
    measure = _measure(column)
    return measure[0] if measure else UNNAMED_SET


def _unit_in(name: str) -> str:
    for kind in ("count", "loss"):
        unit = split_unit(name, kind)[1]
        if unit in (SCALES if kind == "count" else LOSS_UNITS):
            return unit
    return ""


def _only(raw: pd.DataFrame, target: str, candidates: Sequence[ColumnSource]) -> ColumnSource:
    """The single candidate, or the first of several that hold the same; else an error."""
    first = raw[candidates[0].column]
    same = all(raw[other.column].equals(first) for other in candidates[1:])
    if len(candidates) > 1 and not (same and len({source.unit for source in candidates}) == 1):
        names = ", ".join(repr(source.column) for source in candidates)
        name = target.partition(" ")[0]
        raise ValueError(
            f"{target} could be {names}; say which with --columns {name}={candidates[0].column!r}"
        )
    return candidates[0]
