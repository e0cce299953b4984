"""LauncherConfig to submitit: SLURM, local processes in slots, or the launcher's own process."""

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
from sweeps.config import LauncherConfig
from trainer.schema import ConfigError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Resources:
    """What one process of a run needs, and how many there are."""

    ranks: int
    threads: int

    @property
    def slots(self) -> int:
        """CPU threads of a whole run."""
        return self.ranks * self.threads


@dataclass
class Submission:
    """A submitted job and what it holds."""

    job: submitit.Job
    shape: Resources
    units: tuple[Unit, ...]


@dataclass
class Pool:
    """Jobs that hold no more slots together than there are.

    Attributes:
        queue: jobs to start, in this order.
        note: told of every job that ended.
    """

    slots: int
    note: Callable[[Submission], None]
    start: Callable[[Resources, tuple[Unit, ...]], Submission]
    queue: list[tuple[Resources, tuple[Unit, ...]]]
    running: list[Submission] = field(default_factory=list)

    def step(self) -> bool:
        """Start what fits and forget what ended; whether anything is left."""
        ended = [s for s in self.running if s.job.done()]
        self.running = [s for s in self.running if s not in ended]
        for submission in ended:
            self.note(submission)
        free = self.slots - sum(s.shape.slots for s in self.running)
        while self.queue and self.queue[0][0].slots <= free:
            shape, units = self.queue.pop(0)
            self.running.append(self.start(shape, units))
            free -= shape.slots
        return bool(self.running or self.queue)


def resources_of(unit: Unit) -> Resources:
    """What a unit's runs need."""
    execution = unit.branches[0].execution
    return Resources(execution.ranks, execution.threads)


def run_units(
    units: Sequence[Unit], launcher: LauncherConfig, sweep: Path, tick: Callable[[], None]
) -> None:
    """Train units where the launcher config says, calling `tick` now and then, until all ended.

    Raises:
        ConfigError: a run needs more slots than there are.
    """
    if launcher.cluster == "inline":
        TrainJob(sweep, tuple(units), None).run()
        return
    pool = _slurm_pool(units, launcher, sweep) if launcher.cluster == "slurm" else None
    pool = pool or _local_pool(units, launcher, sweep)
    try:
        while pool.step():
            tick()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        # The terminal has sent the interrupt to the local jobs too; they save and end.
        if launcher.cluster == "local":
            while any(not s.job.done() for s in pool.running):
                time.sleep(POLL_SECONDS)
        raise


def available_slots(launcher: LauncherConfig) -> int:
    """CPU threads that local runs may hold together."""
    return launcher.slots or len(os.sched_getaffinity(0))


def _local_pool(units: Sequence[Unit], launcher: LauncherConfig, sweep: Path) -> Pool:
    slots = available_slots(launcher)
    queue: list[tuple[Resources, tuple[Unit, ...]]] = []
    shapes: dict[Resources, list[Unit]] = {}
    for unit in units:
        shapes.setdefault(resources_of(unit), []).append(unit)
    for shape in sorted(shapes, key=lambda s: -s.slots):
        if shape.slots > slots:
            raise ConfigError(
                f"execution.ranks {shape.ranks} x execution.threads {shape.threads} need "
                f"{shape.slots} slots, but there are {slots}; lower one, or raise launcher.slots"
            )
        mine = tuple(shapes[shape])
        if shape.ranks > 1:
            queue += [(shape, (unit,)) for unit in mine]
        else:
            # Every worker is handed all units and claims the next free one.
            queue += [(shape, mine)] * min(slots // shape.slots, len(mine))

    def start(shape: Resources, units: tuple[Unit, ...]) -> Submission:
        executor = submitit.LocalExecutor(folder=sweep / "jobs")
        executor.update_parameters(
            tasks_per_node=shape.ranks,
            cpus_per_task=shape.threads,
            gpus_per_node=launcher.gpus_per_node,
            timeout_min=launcher.minutes,
        )
        return _submit(executor, TrainJob(sweep, units, os.getpid()), shape, None)

    return Pool(slots, _noter(sweep), start, queue)


def _slurm_pool(units: Sequence[Unit], launcher: LauncherConfig, sweep: Path) -> Pool:
    """One SLURM job a multi-rank unit, `runs_per_job` small ones in one job."""
    adopted = _still_queued(sweep)
    waiting = [unit for unit in units if unit.name not in adopted]
    queue: list[tuple[Resources, tuple[Unit, ...]]] = []
    shapes: dict[Resources, list[Unit]] = {}
    for unit in waiting:
        shapes.setdefault(resources_of(unit), []).append(unit)
    for shape, mine in shapes.items():
        size = 1 if shape.ranks > 1 else launcher.runs_per_job
        queue += [(shape, tuple(mine[i : i + size])) for i in range(0, len(mine), size)]

    def start(shape: Resources, units: tuple[Unit, ...]) -> Submission:
        per_node = min(launcher.ranks_per_node or shape.ranks, shape.ranks)
        executor = QueueExecutor(folder=sweep / "jobs", max_num_timeout=100)
        intent = uuid.uuid4().hex
        optional = {
            "partition": launcher.partition,
            "account": launcher.account,
            "mem": None if launcher.memory_gb is None else f"{launcher.memory_gb}GB",
            "gpus_per_node": launcher.gpus_per_node or None,
        }
        executor.update_parameters(
            job_name=f"crossladder-{sweep.name}"[:60],
            comment=intent,
            nodes=shape.ranks // per_node,
            ntasks_per_node=per_node,
            cpus_per_task=shape.threads,
            time=launcher.minutes,
            signal_delay_s=120,
            **{key: value for key, value in optional.items() if value is not None},
        )
        return _submit(executor, TrainJob(sweep, units, None), shape, intent)

    pool = Pool(10**9, _noter(sweep), start, queue)
    pool.running += {s.job.job_id: s for s in adopted.values()}.values()
    return pool


def _noter(sweep: Path) -> Callable[[Submission], None]:
    """Tell the journal of jobs that ended badly, with the end of what they wrote."""
    journal = Journal(sweep)

    def note(submission: Submission) -> None:
        job = submission.job
        logs = sorted(job.paths.result_pickle.parent.glob(f"{job.job_id}_*_log.err"))
        error = _error_of(job)
        if error:
            journal.write("job failed", job=job.job_id, error=error, logs=str(logs[:1]))

    return note


def _error_of(job: submitit.Job) -> str:
    """The last line of a job's error, or nothing."""
    try:
        job.results()
    except (UncompletedJobError, FailedJobError) as error:
        return str(error).strip().splitlines()[-1][:400]
    return ""


def _submit(
    executor: submitit.Executor, job: TrainJob, shape: Resources, intent: str | None
) -> Submission:
    journal = Journal(job.sweep)
    names = ",".join(unit.name for unit in job.units)
    journal.write("intent", units=names, intent=intent, ranks=shape.ranks)
    # It says where the cluster is, not in which job we are, but is cleaned away with the rest.
    cluster = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with submitit.helpers.clean_env():
        os.environ.update(cluster)
        submitted = executor.submit(job)
    fault_point("launch.submitted")
    journal.write("submitted", units=names, intent=intent, ranks=shape.ranks, job=submitted.job_id)
    return Submission(submitted, shape, job.units)


def _still_queued(sweep: Path) -> dict[str, Submission]:
    """Jobs of this sweep that an earlier launcher submitted and SLURM still holds, by unit.

    A launcher killed between sbatch and its next row has left the intent, which is the job's
    comment; where a site writes comments of its own, the job's id is what is left.
    """
    # Rows of local jobs have no intent, and process ids for job ids.
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
