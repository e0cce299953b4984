"""What SLURM's accounting says of jobs that ended."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """One job.

    Attributes:
        states: how it ended each time it ran, in order.
        nodes: of its last time.
    """

    job: str
    states: tuple[str, ...]
    nodes: str

    @property
    def is_over(self) -> bool:
        """Whether it will not run again."""
        return self.states[-1] not in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING")

    @property
    def restarts(self) -> int:
        """How often SLURM put it back into the queue."""
        return self.states.count("REQUEUED")


def read_accounts(ask: Callable[..., str]) -> list[Account]:
    """Every job, through a function that asks a client command."""
    listing = ask(
        *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
        *("--starttime=now-2hours", "--format=JobID,State,NodeList"),
    )
    jobs: dict[str, list[tuple[str, str]]] = {}
    for line in listing.splitlines():
        job, state, nodes = line.split("|")
        jobs.setdefault(job, []).append((state.split()[0], nodes))
    return [
        Account(job, tuple(state for state, _ in times), times[-1][1])
        for job, times in jobs.items()
    ]
