"""The smoke sweep on the private cluster: a launcher killed, jobs requeued, records compared."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launch.journal import Journal
from launch.measurements import Measurement
from tests.cluster.accounting import read_accounts
from tests.cluster.cluster import Cluster
from tests.cluster.configuration import NODES
from tests.cluster.records import compare, incarnation, run_names, trunk_names, unfinished
from trainer.record import read_rows

SWEEP = "sweeps/smoke.yaml"
ON_SLURM = (
    *("launcher.cluster=slurm", "launcher.minutes=20"),
    *("launcher.runs_per_job=3", "launcher.ranks_per_node=1"),
)
NODE_LIST = f"nodename={','.join(NODES)}"
TWO_RANKS = "two-ranks"
STEPS = range(6, 25)
"""Where a run is when its job is disturbed: saved at least once, and far from its end."""
KILLED_AT = 2
"""The submission that the first launcher does not survive."""
PATIENCE_SECONDS = 300.0
"""How long nothing may be written below the drill's folder while something is waited for."""
SETTLE_SECONDS = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Disturbed:
    """A job that was taken out of the training of a run."""

    job: str
    run: str


class Drill:
    """One pass; every figure that it measures has a bound."""

    def __init__(
        self, cluster: Cluster, folder: Path, root: Path, say: Callable[[str], None]
    ) -> None:
        self._cluster, self._folder, self._root, self._say = cluster, folder, root, say
        self._sweep, self._reference = folder / "slurm" / "smoke", folder / "reference" / "smoke"

    def run(self) -> list[Measurement]:
        """Everything, in order.

        Raises:
            RuntimeError: something that was waited for did not come.
        """
        self._kill_a_launcher()
        begin = time.monotonic()
        with self._launched("second", self._sweep, ON_SLURM) as launcher:
            disturbed = self._disturb(launcher)
            self._await("the end of the sweep", lambda: launcher.poll() is not None)
        self._say(f"the sweep ended after {time.monotonic() - begin:.0f} s")
        left = self._settle()
        begin = time.monotonic()
        with self._launched("reference", self._reference) as reference:
            self._await("the end of the local sweep", lambda: reference.poll() is not None)
        self._say(f"the same, local and uninterrupted: {time.monotonic() - begin:.0f} s")
        return [
            Measurement("exit code of the sweep on SLURM", abs(launcher.returncode), "", 0),
            Measurement("exit code of the local sweep", abs(reference.returncode), "", 0),
            Measurement("processes that jobs left behind", left, "processes", 0),
            *self._compare_accounts(disturbed),
            *self._compare_records(disturbed),
        ]

    def _await(
        self, what: str, ready: Callable[[], T], launcher: subprocess.Popen | None = None
    ) -> T:
        """The first answer that is not false.

        Raises:
            RuntimeError: nothing moves, or the launcher that should bring it about has ended.
        """
        # A busy machine is slow, but it goes on writing records and logs.
        written, moved = -1, time.monotonic()
        while not (answer := ready()):
            if launcher is not None and launcher.poll() is not None:
                raise RuntimeError(f"the launcher ended with {launcher.returncode} before {what}")
            if (now := _bytes_below(self._folder)) != written:
                written, moved = now, time.monotonic()
            if time.monotonic() - moved > PATIENCE_SECONDS:
                raise RuntimeError(
                    f"waited for {what}, while nothing was written for {PATIENCE_SECONDS:g} s"
                )
            time.sleep(0.05)
        return answer

    def _kill_a_launcher(self) -> None:
        """Kill a launcher between sbatch and the row that would tell of it, with no job begun."""
        self._cluster.ask("scontrol", "update", NODE_LIST, "state=drain", "reason=drill")
        fault = f"launch.submitted:{KILLED_AT}"
        with self._launched("first", self._sweep, ON_SLURM, fault) as launcher:
            self._await("the kill of the launcher", lambda: launcher.poll() is not None)
        jobs, told = len(self._cluster.jobs()), len(self._journal("submitted"))
        if (jobs, told) != (KILLED_AT, KILLED_AT - 1):
            raise RuntimeError(
                f"the first launcher should have been killed with {KILLED_AT} jobs, one of them "
                f"not in the journal, but there are {jobs} and {told}; see {self._folder}/first.log"
            )
        self._say(f"a launcher was killed after sbatch: {jobs} jobs, the journal knows {told}")

    def _disturb(self, launcher: subprocess.Popen) -> list[Disturbed]:
        """Requeue one job from outside, and signal the two-rank one, each while it trains."""
        self._await("a job of every unit", lambda: self._units() == set(self._jobs()), launcher)
        self._cluster.ask("scontrol", "update", NODE_LIST, "state=resume")
        jobs, double = self._jobs(), self._two_rank_job()
        requests = {double: ("scancel", "--signal=USR2")}
        requests |= {job: ("scontrol", "requeue") for job in jobs.values() if job != double}
        disturbed: list[Disturbed] = []
        while requests:
            unit = self._training(launcher, [unit for unit, job in jobs.items() if job in requests])
            job = jobs[unit]
            self._cluster.ask(*requests[job], job)
            self._say(f"{' '.join(requests[job])} {job}, while it trained {unit}")
            disturbed.append(Disturbed(job, unit))
            # One of each kind is enough.
            requests = {j: words for j, words in requests.items() if words != requests[job]}
        return disturbed

    def _training(self, launcher: subprocess.Popen, units: list[str]) -> str:
        """Wait for the first of some units to be in the middle of its training."""

        def catch() -> str:
            return next((unit for unit in units if self._is_training(unit)), "")

        return self._await(f"training of {', '.join(units)}", catch, launcher)

    def _settle(self) -> int:
        """Processes that are still there a moment after the sweep has ended."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._cluster.processes() and time.monotonic() < deadline:
            time.sleep(0.3)
        return len(self._cluster.processes())

    def _compare_accounts(self, disturbed: list[Disturbed]) -> list[Measurement]:
        """Whether SLURM's accounting agrees with the journal."""
        self._await(
            "accounting to catch up",
            lambda: all(account.is_over for account in read_accounts(self._cluster.ask)),
        )
        accounts = {account.job: account for account in read_accounts(self._cluster.ask)}
        for account in accounts.values():
            self._say(f"sacct: job {account.job} {' '.join(account.states)} on {account.nodes}")
        mine = set(self._jobs().values())
        restarts = {job: int(any(job == d.job for d in disturbed)) for job in accounts}
        double = [a for a in accounts.values() if a.job == self._two_rank_job()]
        return [
            Measurement("jobs submitted", len(accounts), "jobs"),
            Measurement("jobs beside those of the journal", len(set(accounts) ^ mine), "jobs", 0),
            Measurement(
                "jobs that accounting does not call completed",
                sum(account.states[-1] != "COMPLETED" for account in accounts.values()),
                *("jobs", 0),
            ),
            Measurement(
                "jobs with another number of restarts than requeues",
                sum(account.restarts != restarts[job] for job, account in accounts.items()),
                *("jobs", 0),
            ),
            Measurement(
                "nodes of the two-rank run", _count_nodes(double[0].nodes), "nodes", 2, "higher"
            ),
        ]

    def _compare_records(self, disturbed: list[Disturbed]) -> list[Measurement]:
        """Whether every run equals the same run without SLURM and interruption."""
        names = [*run_names(self._sweep), *trunk_names(self._sweep)]
        compared = [compare(self._sweep / name, self._reference / name) for name in names]
        begun = [incarnation(self._sweep / d.run) for d in disturbed]
        self._say(f"times the interrupted runs were begun: {begun}")
        return [
            Measurement("runs not done", len(unfinished(self._sweep)), "runs", 0),
            Measurement("interrupted runs", sum(n > 1 for n in begun), "runs", 2, "higher"),
            Measurement("runs compared", len(names), "runs", 1, "higher"),
            Measurement("exact values", sum(c.values for c in compared), "", 1, "higher"),
            Measurement("values that differ", sum(c.different for c in compared), "", 0),
        ]

    @contextlib.contextmanager
    def _launched(
        self, name: str, sweep: Path, overrides: tuple[str, ...] = (), fault: str = ""
    ) -> Iterator[subprocess.Popen]:
        """The real command, killed at the end if it still runs."""
        words = ("launch/sweep.py", SWEEP, *overrides, "--runs", str(sweep.parent))
        environment = {**self._cluster.environment, "CROSSLADDER_FAULT": fault}
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self._root, env=environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _journal(self, *events: str) -> list:
        return [row for row in Journal(self._sweep).rows() if row["event"] in events]

    def _units(self) -> set[str]:
        repeats = [name for name in run_names(self._sweep) if "." in name]
        return {*trunk_names(self._sweep), *repeats}

    def _jobs(self) -> dict[str, str]:
        rows = self._journal("submitted", "adopted")
        return {unit: str(row["job"]) for row in rows for unit in str(row["units"]).split(",")}

    def _two_rank_job(self) -> str:
        return next(job for unit, job in self._jobs().items() if TWO_RANKS in unit)

    def _is_training(self, unit: str) -> bool:
        rows = read_rows(self._sweep / unit / "metrics.jsonl")
        return bool(rows) and rows[-1]["step"] in STEPS


def _count_nodes(listing: str) -> int:
    """Of a SLURM node list such as n1 or n[1-2]."""
    return 2 if "-" in listing or "," in listing else 1


def _bytes_below(folder: Path) -> int:
    """Bytes of the run records and logs; checkpoints come and go, and are left out."""
    names = (*folder.glob("*.log"), *folder.glob("*/*/*.jsonl"), *folder.glob("*/*/*/*.jsonl"))
    return sum(name.stat().st_size for name in names)
