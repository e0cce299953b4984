"""What the run records say: how often a run was begun, and whether two records are equal."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.record import EXACT_COLUMNS, Row, StoredRun, read_json, read_run


@dataclass(frozen=True)
class Compared:
    """Exact values of two records, side by side."""

    values: int
    different: int


def run_names(sweep: Path) -> list[str]:
    """Every run that the sweep asks for."""
    stored = yaml.safe_load((sweep / "sweep.yaml").read_text())
    return [*stored["runs"], *stored["repeats"]]


def trunk_names(sweep: Path) -> list[str]:
    """The trunks that the runs branch off."""
    return yaml.safe_load((sweep / "sweep.yaml").read_text())["trunks"]


def unfinished(sweep: Path) -> list[str]:
    """Runs that have not reached their budget."""
    runs = {name: read_run(sweep / name) for name in run_names(sweep)}
    return [name for name, run in runs.items() if run.summary.get("state") != "done"]


def incarnation(run: Path) -> int:
    """How often a run was begun."""
    return int(read_json(run / "OWNER.json")["incarnation"])


def compare(left: Path, right: Path) -> Compared:
    """Compare every exact value of two run folders, bit by bit, and the hash of the weights."""
    mine, other = _exact(read_run(left)), _exact(read_run(right))
    places = set(mine) | set(other)
    return Compared(len(places), sum(mine.get(place) != other.get(place) for place in places))


def _exact(run: StoredRun) -> dict[tuple[object, ...], str]:
    """Each exact value as text that tells any two floats apart, by where it stands."""
    values: dict[tuple[object, ...], str] = {
        ("weights",): str(run.summary.get("parameters_sha256"))
    }
    for kind, rows in (("metrics", run.metrics), ("evaluations", run.evaluations)):
        for row in rows:
            place = (kind, row["step"], row.get("evaluation_set"))
            values |= {(*place, name): _text(row, name) for name in EXACT_COLUMNS & set(row)}
    return values


def _text(row: Row, name: str) -> str:
    value = row[name]
    return value.hex() if isinstance(value, float) else repr(value)
