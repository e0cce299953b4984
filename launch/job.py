"""The unit of submission: runs that need the same resources, trained one after the other."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from launch.journal import Journal
from launch.run_status import survey
from sweeps.grammar import Experiment
from trainer.exit_codes import ExitCode
from trainer.failures import Failure, failure_of
from trainer.record import write_atomically
from untrusted.paths import inside

if TYPE_CHECKING:
    from trainer.session import Lineage

WATCH_SECONDS = 0.5
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Which process of which run this is; in a shell of the user they are those of something else."""


@dataclass(frozen=True)
class Unit:
    """Runs that one worker trains in order: a trunk and its branches, or one run alone.

    Attributes:
        name: of its lock file, by which one worker claims it.
        trunk: the constant-rate run that the branches share; None for a run alone.
        forks: steps at which the branches leave the trunk.
        branches: the runs of the sweep.
    """

    name: str
    branches: tuple[Experiment, ...]
    trunk: Experiment | None = None
    forks: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        """Tokens to train in all, from scratch."""
        if self.trunk is None:
            return sum(e.run.budget.tokens for e in self.branches)
        batch = self.trunk.run.optimizer.batch_tokens
        tails = (e.run.budget.tokens - _fork_of(e) * batch for e in self.branches)
        return self.trunk.run.budget.tokens + sum(tails)


@dataclass
class TrainJob:
    """Trains units until every one is complete or held by another worker.

    Attributes:
        sweep: folder of the sweep.
        units: longest first; every local worker gets all of them and claims the next free one.
        launcher: process id of a local launcher, after whose death the job stops too; None on a
            cluster.
        requeued: whether the launcher submitted it to SLURM, where a job that is stopped is
            requeued. That a SLURM job surrounds the process says nothing: it may be the user's own.
        begun: the journal's end when the launcher made the job; a run that failed since is not
            retried. None for now.
        failed: by run, why it failed in this process.
    """

    sweep: Path
    units: tuple[Unit, ...]
    launcher: int | None
    requeued: bool = False
    begun: int | None = None
    failed: dict[str, Failure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.begun is None:
            self.begun = Journal(self.sweep).mark()

    def __call__(self) -> None:
        """Train the missing runs; called on every rank."""
        environment = submitit.helpers.TorchDistributedEnvironment()
        # Ranks pick their device by LOCAL_RANK among those that SLURM or submitit gave to the job.
        environment.export(set_cuda_visible_devices=False)
        os.environ["LOCAL_WORLD_SIZE"] = str(environment.local_world_size)
        self.run()
        # A worker of single runs goes on after a failure; the ranks of a failed run say so.
        if self.failed and environment.world_size > 1:
            sys.exit(int(next(iter(self.failed.values())).code))

    def run_here(self) -> None:
        """Train the missing runs in this process alone, whatever job surrounds it."""
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        self.run()

    def run(self) -> None:
        """Train the missing runs, in this process and its peers."""
        if self.launcher is not None:
            _end_with(self.launcher)
        # A first pass takes free units only; a second one waits for those that others hold, in case
        # their worker dies. The ranks of one run share a job of their own and must all do the same,
        # so they wait at once.
        solo = os.environ.get("WORLD_SIZE", "1") == "1"
        for wait in (False, True) if solo else (True,):
            for unit in self.units:
                with self._claim(unit, wait=wait) as mine:
                    if mine:
                        self._train(unit)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit submits again after a timeout or a preemption outside of training."""
        return submitit.helpers.DelayedSubmission(self)

    def _train(self, unit: Unit) -> None:
        from trainer.session import Lineage

        trunk_folder = None
        if unit.trunk is not None:
            trunk_folder = inside(self.sweep, unit.trunk.trunk_id)
            missing = [e for e in unit.branches if self._is_open(e)]
            if not missing:
                return
            if not _has_forks(trunk_folder, missing):
                lineage = Lineage(forks=unit.forks)
                if not self._train_one(unit.trunk, trunk_folder, lineage):
                    return
        for experiment in unit.branches:
            if self._is_open(experiment):
                folder = inside(self.sweep, experiment.folder_name)
                self._train_one(experiment, folder, Lineage(trunk=trunk_folder))

    def _train_one(self, experiment: Experiment, folder: Path, lineage: "Lineage") -> bool:
        """Train one run; an exception ends this run alone and is written to the journal."""
        from trainer.train import train

        journal, first = Journal(self.sweep), os.environ.get("RANK", "0") == "0"
        if folder.name in self.failed | journal.failures(self.begun or 0):
            return False
        begin = time.monotonic()
        try:
            outcome = train(
                experiment.run, experiment.execution, experiment.evaluation, folder, lineage
            )
        except Exception as error:  # noqa: BLE001
            self._record_failure(error, folder, journal)
            return False
        seconds = time.monotonic() - begin
        if first:
            journal.write("ended", run=folder.name, state=outcome.state, seconds=seconds)
        if outcome.state == "stopped":
            _leave(journal, first=first, requeued=self.requeued)
        return True

    def _record_failure(self, error: Exception, folder: Path, journal: Journal) -> None:
        """Write down why a run failed, as far as the disk allows; the terminal has all of it."""
        otherwise = ExitCode.BAD_CONFIG if isinstance(error, ValueError) else ExitCode.FAILED
        reason, code = self.failed[folder.name] = failure_of(error, otherwise)
        trace = traceback.format_exc()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal.write("failed", run=folder.name, error=reason, code=int(code))
            write_atomically(folder / "error.txt", trace)
        except OSError as second:
            sys.stderr.write(f"{trace}{folder.name}: its failure cannot be recorded: {second}\n")

    def _is_open(self, experiment: Experiment) -> bool:
        statuses, _ = survey([experiment], self.sweep)
        return statuses[experiment.folder_name].open

    @contextlib.contextmanager
    def _claim(self, unit: Unit, *, wait: bool) -> Iterator[bool]:
        """Lock a unit against other workers; only rank 0 needs the lock, its peers follow it."""
        if os.environ.get("RANK", "0") != "0":
            yield True
            return
        claims = self.sweep / "claims"
        claims.mkdir(exist_ok=True)
        with inside(claims, f"{unit.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _fork_of(experiment: Experiment) -> int:
    from trainer.schedule import decay_begins

    return decay_begins(experiment.run)


def _has_forks(trunk: Path, branches: list[Experiment]) -> bool:
    """Whether the trunk has the checkpoint that each branch starts from."""
    from trainer.manifest import step_name

    checkpoints = trunk / "checkpoints"
    return all((checkpoints / step_name(_fork_of(e)) / "MANIFEST.json").exists() for e in branches)


def _leave(journal: Journal, *, first: bool, requeued: bool) -> None:
    """End a stopped job; of one that the launcher submitted to SLURM, rank 0 requeues it first."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not requeued:
        os._exit(ExitCode.REQUEUE)
    if first:
        asked = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
        journal.write("requeued", job=job, error=asked.stderr.strip() or None)
    # SLURM now kills all ranks. A rank that returned instead would write submitit's result file,
    # and the launcher would take the job for finished.
    time.sleep(120)
    os._exit(ExitCode.REQUEUE)


def _end_with(launcher: int) -> None:
    """Stop this process, with everything saved, when the launcher has died: no orphans."""

    def watch() -> None:
        while Path(f"/proc/{launcher}").exists():
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(ExitCode.REQUEUE)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
