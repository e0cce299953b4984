"""Job states from SLURM's controller (squeue), not its accounting, which lags and may be absent."""

import subprocess

import submitit
from submitit.slurm.slurm import SlurmInfoWatcher

LONGEST_DELAY_SECONDS = 30
_LIST = ("squeue", "--me", "--noheader", "--format=%A|%k")
"""Lists pending, running, suspended, completing and requeued jobs."""


class QueueWatcher(SlurmInfoWatcher):
    """A job has ended when squeue no longer lists it; if squeue fails, nothing has ended."""

    def _make_command(self) -> list[str] | None:
        return list(_LIST) if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The state of every registered job, from the output of squeue."""
        held = _parse(string.decode() if isinstance(string, bytes) else string)
        return {
            job: {"JobID": job, "State": "RUNNING" if job in held else "ENDED"}
            for job in self._registered
        }


class QueuedJob(submitit.SlurmJob):
    """A job whose state comes from squeue."""

    watcher = QueueWatcher(delay_s=LONGEST_DELAY_SECONDS)


class QueueExecutor(submitit.SlurmExecutor):
    """Submits jobs that are watched through squeue."""

    job_class = QueuedJob


def held_jobs() -> dict[str, str]:
    """The comment of each of the user's pending and running jobs, by its id.

    Raises:
        RuntimeError: squeue fails.
    """
    asked = subprocess.run(_LIST, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise RuntimeError(
            f"squeue failed with exit code {asked.returncode}: {asked.stderr.strip()}; nothing was "
            "submitted, since jobs of this sweep may be queued already. Try again when SLURM "
            "responds"
        )
    return _parse(asked.stdout)


def _parse(listing: str) -> dict[str, str]:
    lines = (line.strip().partition("|") for line in listing.splitlines())
    return {job: comment for job, _, comment in lines}
