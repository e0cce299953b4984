"""Losses of each document of an evaluation set, as a run stored them at its end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.tables.frames import Array
from trainer.record import Row

FILE = "documents.json"
ROUNDING = 1e-9
"""What the sum over documents may differ by from the total of the set, relatively."""


@dataclass(frozen=True)
class DocumentLosses:
    """One run on one evaluation set.

    Attributes:
        nats: summed loss of each document (documents,) [nats].
        targets: predicted tokens of each document (documents,).
    """

    nats: Array
    targets: Array


def read_document_losses(run: Path, rows: list[Row]) -> dict[str, DocumentLosses]:
    """Evaluation set -> losses of its documents; empty if the run has stored none.

    Args:
        run: folder of the run.
        rows: the evaluated sets that the documents must add up to.

    Raises:
        ValueError: the file cannot be read, or does not add up to the rows.
    """
    file = run / FILE
    if not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text())
        measured, sets = (stored["evaluation_id"], stored["step"]), stored["sets"]
        found = {name: _losses(each) for name, each in sets.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    for row in rows:
        if row.get("subset") is False and (row["evaluation_id"], row["step"]) == measured:
            _require_sums(file, row, found)
    return found


def _losses(stored: Mapping) -> DocumentLosses:
    nats, targets = (np.array(stored[key], dtype=np.float64) for key in ("nats", "targets"))
    if nats.ndim != 1 or nats.shape != targets.shape or not np.isfinite([nats, targets]).all():
        raise ValueError("nats and targets are not two lists of numbers of one length")
    return DocumentLosses(nats, targets)


def _require_sums(file: Path, row: Row, found: Mapping[str, DocumentLosses]) -> None:
    losses = found.get(str(row["evaluation_set"]))
    total, targets = float(row["total_nats"] or 0), float(row["targets"] or 0)
    if (
        losses is None
        or losses.targets.sum() != targets
        or abs(losses.nats.sum() - total) > ROUNDING * abs(total)
    ):
        raise ValueError(
            f"the documents of {row['evaluation_set']} in {file} do not add up to the set's loss"
        )
