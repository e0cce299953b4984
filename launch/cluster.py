"""Run units through submitit: on SLURM, in local processes, or in the launcher's own process."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from data_pipelines.fault_points import fault_point
from launch.job import TrainJob, Unit
from launch.journal import Journal
from launch.slurm import QueuedJob, QueueExecutor, held_jobs
from sweeps.checks import available_slots, nodes_of
from sweeps.config import LauncherConfig

POLL_SECONDS = 0.5
NO_LIMIT_MINUTES = 60 * 24 * 3650
"""launcher.minutes is SLURM's --time; a run on this machine takes as long as it takes."""


@dataclass(frozen=True)
class Resources:
    """Processes of a run, and CPU threads of each."""

    ranks: int
    threads: int

    @property
    def slots(self) -> int:
        """CPU threads of a whole run."""
        return self.ranks * self.threads


@dataclass
class Submission:
    """A submitted job and the resources it uses."""

    job: submitit.Job
    resources: Resources
    units: tuple[Unit, ...]


@dataclass
class Pool:
    """Jobs that together use no more slots than there are.

    Attributes:
        queue: jobs to start, in this order.
        note: called with every job that ended.
    """

    slots: int
    note: Callable[[Submission], None]
    start: Callable[[Resources, tuple[Unit, ...]], Submission]
    queue: list[tuple[Resources, tuple[Unit, ...]]]
    running: list[Submission] = field(default_factory=list)

    def step(self) -> bool:
        """Drop jobs that ended and start those that fit; returns whether any are left."""
        ended = [s for s in self.running if s.job.done()]
        self.running = [s for s in self.running if s not in ended]
        for submission in ended:
            self.note(submission)
        free = self.slots - sum(s.resources.slots for s in self.running)
        while self.queue and self.queue[0][0].slots <= free:
            resources, units = self.queue.pop(0)
            self.running.append(self.start(resources, units))
            free -= resources.slots
        return bool(self.running or self.queue)


def resources_of(unit: Unit) -> Resources:
    """The resources that a unit's runs need."""
    execution = unit.branches[0].execution
    return Resources(execution.ranks, execution.threads)


def run_units(
    units: Sequence[Unit], launcher: LauncherConfig, sweep: Path, tick: Callable[[], None]
) -> None:
    """Train units where the launcher config says, calling `tick` twice a second, until all end.

    They fit there, which `sweeps.checks.check_machine` has checked.
    """
    if launcher.cluster == "inline":
        TrainJob(sweep, tuple(units), None).run_here()
        return
    pool = _slurm_pool(units, launcher, sweep) if launcher.cluster == "slurm" else None
    pool = pool or _local_pool(units, launcher, sweep)
    try:
        while pool.step():
            tick()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        # Ctrl-C reaches the local jobs too, as part of the foreground process group. Wait until
        # they have saved, so that the shell prompt returns when everything is on disk.
        if launcher.cluster == "local":
            while any(not s.job.done() for s in pool.running):
                time.sleep(POLL_SECONDS)
        raise


def _local_pool(units: Sequence[Unit], launcher: LauncherConfig, sweep: Path) -> Pool:
    slots = available_slots(launcher)
    queue: list[tuple[Resources, tuple[Unit, ...]]] = []
    groups: dict[Resources, list[Unit]] = {}
    for unit in units:
        groups.setdefault(resources_of(unit), []).append(unit)
    for resources in sorted(groups, key=lambda s: -s.slots):
        mine = tuple(groups[resources])
        if resources.ranks > 1:
            queue += [(resources, (unit,)) for unit in mine]
        else:
            # Every worker gets all units and claims the next free one, so that none idles.
            queue += [(resources, mine)] * min(slots // resources.slots, len(mine))

    def start(resources: Resources, units: tuple[Unit, ...]) -> Submission:
        executor = submitit.LocalExecutor(folder=sweep / "jobs")
        executor.update_parameters(
            tasks_per_node=resources.ranks,
            cpus_per_task=resources.threads,
            gpus_per_node=launcher.gpus_per_node,
            timeout_min=NO_LIMIT_MINUTES,
        )
        return _submit(executor, TrainJob(sweep, units, os.getpid()), resources, None)

    return Pool(slots, _noter(sweep), start, queue)


def _slurm_pool(units: Sequence[Unit], launcher: LauncherConfig, sweep: Path) -> Pool:
    """One SLURM job per multi-rank unit; `runs_per_job` single-rank units share a job."""
    adopted = _still_queued(sweep)
    waiting = [unit for unit in units if unit.name not in adopted]
    queue: list[tuple[Resources, tuple[Unit, ...]]] = []
    groups: dict[Resources, list[Unit]] = {}
    for unit in waiting:
        groups.setdefault(resources_of(unit), []).append(unit)
    for resources, mine in groups.items():
        size = 1 if resources.ranks > 1 else launcher.runs_per_job
        queue += [(resources, tuple(mine[i : i + size])) for i in range(0, len(mine), size)]

    def start(resources: Resources, units: tuple[Unit, ...]) -> Submission:
        nodes, per_node = nodes_of(resources.ranks, launcher)
        executor = QueueExecutor(folder=sweep / "jobs", max_num_timeout=100)
        intent = uuid.uuid4().hex
        optional = {
            "partition": launcher.partition,
            "account": launcher.account,
            "mem": None if launcher.memory_gb is None else f"{launcher.memory_gb}GB",
            "gpus_per_node": min(launcher.gpus_per_node, per_node) or None,
        }
        executor.update_parameters(
            job_name=f"crossladder-{sweep.name}"[:60],
            comment=intent,
            nodes=nodes,
            ntasks_per_node=per_node,
            cpus_per_task=resources.threads,
            time=launcher.minutes,
            signal_delay_s=120,
            **{key: value for key, value in optional.items() if value is not None},
        )
        return _submit(executor, TrainJob(sweep, units, None, requeued=True), resources, intent)

    pool = Pool(10**9, _noter(sweep), start, queue)
    # A job of several units is adopted once.
    pool.running += {s.job.job_id: s for s in adopted.values()}.values()
    return pool


def _noter(sweep: Path) -> Callable[[Submission], None]:
    """A function that writes jobs that failed to the journal, with their last line of output."""
    journal = Journal(sweep)

    def note(submission: Submission) -> None:
        job = submission.job
        logs = sorted(job.paths.result_pickle.parent.glob(f"{job.job_id}_*_log.err"))
        error = _error_of(job)
        if error:
            journal.write("job failed", job=job.job_id, error=error, logs=str(logs[:1]))

    return note


def _error_of(job: submitit.Job) -> str:
    """The last line of a job's error, or an empty string."""
    try:
        job.results()
    except (UncompletedJobError, FailedJobError) as error:
        return str(error).strip().splitlines()[-1][:400]
    return ""


def _submit(
    executor: submitit.Executor, job: TrainJob, resources: Resources, intent: str | None
) -> Submission:
    journal = Journal(job.sweep)
    names = ",".join(unit.name for unit in job.units)
    journal.write("intent", units=names, intent=intent, ranks=resources.ranks)
    # Variables of a job that the launcher itself may run in must not leak into the new one, but
    # clean_env also drops SLURM_CONF, which says where the cluster is.
    cluster = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(cluster)
        submitted = executor.submit(job)
    fault_point("launch.submitted")
    journal.write(
        "submitted", units=names, intent=intent, ranks=resources.ranks, job=submitted.job_id
    )
    return Submission(submitted, resources, job.units)


def _still_queued(sweep: Path) -> dict[str, Submission]:
    """Jobs of this sweep that an earlier launcher submitted and SLURM still holds, by unit.

    A launcher may be killed between sbatch and writing the job id to the journal. Its intent row is
    there before, and the job carries the intent as its comment. Where a site overwrites comments,
    the job id has to do.
    """
    # Rows of local jobs have no intent; their job ids are process ids, which SLURM may use too.
    rows = [row for row in Journal(sweep).rows() if row.get("intent")]
    known = {str(row.get("job") or row["intent"]): row for row in rows}
    adopted: dict[str, Submission] = {}
    for name, comment in held_jobs().items():
        row = known.get(comment) or known.get(name)
        if row is not None:
            ranks = int(row["ranks"] or 1)
            job = QueuedJob(folder=sweep / "jobs", job_id=name, tasks=range(ranks))
            units = str(row["units"]).split(",")
            adopted |= dict.fromkeys(units, Submission(job, Resources(0, 0), ()))
            Journal(sweep).write("adopted", units=row["units"], job=name)
    return adopted
