"""`reports/<target>.json`: what a Makefile target measured, beside its committed bounds."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.machine import provenance
from trainer.record import write_atomically


@dataclass(frozen=True)
class Measurement:
    """One figure.

    Attributes:
        bound: the committed limit; None where there is none.
        better: which side of the bound is good.
    """

    name: str
    value: float
    unit: str
    bound: float | None = None
    better: Literal["lower", "higher"] = "lower"

    @property
    def holds(self) -> bool | None:
        """Whether the bound is kept."""
        if self.bound is None:
            return None
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


def write_measurements(target: str, rows: Sequence[Measurement], root: Path) -> Path:
    """Write the figures of one target, with machine, versions and commit."""
    folder = root / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "target": target,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": provenance(),
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
    }
    path = folder / f"{target}.json"
    write_atomically(path, json.dumps(stored, indent=1) + "\n")
    return path
