"""Copies metrics to wandb; the run record remains the source of truth."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import wandb

FINISH_SECONDS = 60.0


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
        """Flush what was copied, as far as the network takes it in time.

        Raises:
            TimeoutError: it does not; wandb keeps the rest in its folder.
        """
        failed: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001
                failed.append(error)

        # wandb tries again for days without a network, and would hold the run's processes.
        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if failed:
            raise failed[0]
        if thread.is_alive():
            raise TimeoutError(f"not uploaded within {FINISH_SECONDS:g} s; use wandb sync later")
