"""Copies rows of the run record to wandb; the record stays the truth, and no run waits for it."""

import os
from collections.abc import Mapping
from pathlib import Path

import wandb


class Tracker:
    """A view of one run in wandb: online if a key is there, offline otherwise.

    Args:
        name: the run's id, which wandb's run takes too, so that a resumed run goes on in it.
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
