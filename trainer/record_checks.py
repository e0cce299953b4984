"""Read a run record whose files agree with each other; a damaged or mixed one is refused."""

from pathlib import Path

from trainer.identity import config_hash, require_same
from trainer.record import StoredRun, read_run

DATASET_IDS = ("dataset_root_hash", "tokenizer_fingerprint")
END_IDS = ("certificate", "parameters_sha256")


def read_whole_run(path: Path) -> StoredRun:
    """Read a run folder and check that its files are of one run.

    Raises:
        IdentityError: its config is not the one that it was trained with.
    """
    stored = read_run(path)
    _require_own_config(stored)
    return stored


def recorded_ids(stored: StoredRun, step: int) -> dict[str, object]:
    """What the record says of a checkpoint: its data, and at the run's end its samples."""
    ids = {key: stored.provenance[key] for key in DATASET_IDS if key in stored.provenance}
    if stored.summary.get("step") == step:
        ids |= {key: stored.summary[key] for key in END_IDS if key in stored.summary}
    return ids


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
