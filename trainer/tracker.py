"""Copies metrics to wandb; the run record remains the source of truth."""

import os
from collections.abc import Mapping
from pathlib import Path

import wandb


class Tracker:
    """One run in wandb: online if WANDB_API_KEY is set, offline otherwise.

    Args:
        name: the run's id; wandb's run has the same one, so that a resumed run continues it.
    """

    def __init__(self, name: str, folder: Path, config: Mapping) -> None:
        online = bool(os.environ.get("WANDB_API_KEY"))
        self._run = wandb.init(
            project="crossladder",
            id=name,
            name=name,
            resume="allow" if online else None,
            dir=folder,
            config=dict(config),
            mode="online" if online else "offline",
            settings=wandb.Settings(init_timeout=30, console="off", silent=True),
        )

    def log(self, row: Mapping) -> None:
        """Copy a row."""
        self._run.log(dict(row))

    def close(self) -> None:
        """Flush what was copied."""
        self._run.finish()
