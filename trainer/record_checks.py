"""Read a run record whose files agree with each other; a damaged or mixed one is refused."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.append_file import Seal
from trainer.exit_codes import ExitCode
from trainer.identity import config_hash, require_same
from trainer.record import ROW_FILES, Row, StoredRun, read_run
from untrusted.paths import inside

DATASET_IDS = ("dataset_root_hash", "tokenizer_fingerprint")
END_IDS = ("certificate", "parameters_sha256")
SAME = 1e-9
"""Relative difference of two numbers that are stored as rounded and say the same."""


class DamagedRecordError(RuntimeError):
    """Files of a finished run are not what it wrote, or contradict each other."""

    exit_code = ExitCode.BAD_DATA


def read_whole_run(path: Path, row_files: Sequence[str] = ROW_FILES) -> StoredRun:
    """Read a run folder and check that its files are whole and of one run.

    Args:
        path: of the run.
        row_files: those that must be there; a packed study has no metrics.

    Raises:
        IdentityError: its config is not the one that it was trained with.
        DamagedRecordError: rows are missing or changed, or contradict the summary.
        RuntimeError: a file cannot be read.
    """
    stored = read_run(path)
    _require_own_config(stored)
    sealed = stored.summary.get("rows")
    if sealed:
        damage = broken_seal(path, {name: sealed[name] for name in row_files}) or _contradiction(
            stored, row_files
        )
        if damage:
            raise DamagedRecordError(
                f"{damage}; restore {path} from a backup, or move it away and rerun the same "
                "command to train it again"
            )
    return stored


def recorded_ids(stored: StoredRun, step: int) -> dict[str, object]:
    """What the record says of a checkpoint: its data, and at the run's end its samples."""
    ids = {key: stored.provenance[key] for key in DATASET_IDS if key in stored.provenance}
    if stored.summary.get("step") == step:
        ids |= {key: stored.summary[key] for key in END_IDS if key in stored.summary}
    return ids


def broken_seal(path: Path, sealed: Mapping[str, Mapping]) -> str:
    """Which rows are not those that were sealed; empty if all are."""
    for name, seal in sealed.items():
        file = inside(path, name)
        if not Seal(**seal).holds(file):
            there = file.stat().st_size if file.exists() else 0
            return (
                f"rows of {file} are missing or changed: {there} bytes are there, and the first "
                f"{seal['bytes']} are not those that the run wrote"
            )
    return ""


def _require_own_config(stored: StoredRun) -> None:
    """The config is that of the first start; a trunk's later ones may have larger budgets."""
    starts = stored.provenance.get("starts", [])
    first = next((start for start in starts if "config_sha256" in start), None)
    if first is not None:
        require_same(
            str(stored.path / "config.yaml"),
            {"config_sha256": config_hash(stored.config)},
            {"config_sha256": first["config_sha256"]},
            of="its provenance.json",
            remedy=f"restore that file, or move {stored.path} away and train the run again",
        )


def _contradiction(stored: StoredRun, row_files: Sequence[str]) -> str:
    """Two quantities of a finished run that should say the same; empty if there are none."""
    batch = stored.config["optimizer"]["batch_tokens"]
    found = [_of_evaluation(row, batch) for row in stored.evaluations if not row.get("error")]
    if "metrics.jsonl" in row_files:
        found += _of_metrics(stored, batch)
    found.append(_differ("tokens", stored.summary["tokens"], stored.summary["step"] * batch))
    first = next((text for text in found if text), "")
    return f"the record in {stored.path} contradicts itself: {first}" if first else ""


def _of_metrics(stored: StoredRun, batch: int) -> list[str]:
    rows, summary = stored.metrics, stored.summary
    if not rows:
        return ["metrics.jsonl has no rows"]
    first, texts = int(rows[0]["step"] or 0), []
    for step, row in enumerate(rows, start=first):
        texts.append(_differ("step", row["step"], step))
        texts.append(_differ(f"tokens at step {step}", row["tokens"], step * batch))
    texts.append(_differ("last step", rows[-1]["step"], summary["step"]))
    texts.append(_differ("certificate", rows[-1]["certificate"], summary["certificate"]))
    seen = {row["step"]: row["certificate"] for row in rows}
    for row in stored.evaluations:
        step = row["step"]
        own = seen.get(step, row.get("certificate"))
        texts.append(_differ(f"certificate at step {step}", row.get("certificate"), own))
    return texts


def _of_evaluation(row: Row, batch: int) -> str:
    where = f"of {row['evaluation_set']} at step {row['step']}"
    nats, size = float(row["total_nats"] or math.nan), float(row["utf8_bytes"] or 0)
    bits = nats / math.log(2) / max(size, 1.0)
    stated = float(row["bits_per_byte"] or math.nan)
    if math.isfinite(bits) and not math.isclose(stated, bits, rel_tol=SAME):
        return f"bits_per_byte {where} is {stated}, but its nats and bytes give {bits}"
    return _differ(f"tokens {where}", row["tokens"], int(row["step"] or 0) * batch)


def _differ(what: str, stated: object, other: object) -> str:
    return "" if stated == other else f"{what} is {stated} in one place and {other} in another"
