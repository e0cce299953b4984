"""Which jobs SLURM's controller holds; its accounting is never asked, it lags and may be absent."""

import subprocess

import submitit
from submitit.slurm.slurm import SlurmInfoWatcher

LONGEST_DELAY_SECONDS = 30
_LIST = ("squeue", "--me", "--noheader", "--format=%A|%k")
"""Pending, running, suspended and completing jobs, also those put back into the queue."""


class QueueWatcher(SlurmInfoWatcher):
    """A job has ended when the controller no longer holds it; when it is silent, nothing has."""

    def _make_command(self) -> list[str] | None:
        return list(_LIST) if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The state of every job that was asked about."""
        held = _parse(string.decode() if isinstance(string, bytes) else string)
        return {
            job: {"JobID": job, "State": "RUNNING" if job in held else "ENDED"}
            for job in self._registered
        }


class QueuedJob(submitit.SlurmJob):
    """A job whose state is the controller's answer."""

    watcher = QueueWatcher(delay_s=LONGEST_DELAY_SECONDS)


class QueueExecutor(submitit.SlurmExecutor):
    """Submits such jobs."""

    job_class = QueuedJob


def held_jobs() -> dict[str, str]:
    """The comment of each of the user's jobs that waits or runs, by its id.

    Raises:
        RuntimeError: the controller does not answer.
    """
    asked = subprocess.run(_LIST, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise RuntimeError(
            f"squeue ended with {asked.returncode}: {asked.stderr.strip()}; nothing was submitted, "
            "since jobs of this sweep may be there already: try again when SLURM answers"
        )
    return _parse(asked.stdout)


def _parse(listing: str) -> dict[str, str]:
    lines = (line.strip().partition("|") for line in listing.splitlines())
    return {job: comment for job, _, comment in lines}
