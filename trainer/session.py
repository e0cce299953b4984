"""One run while it is trained: its engine, its record on rank 0, and what is done with both."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data_pipelines.batch import Batch
from data_pipelines.fault_points import fault_point
from data_pipelines.manifest import read_manifest as read_dataset
from data_pipelines.stream import TokenStream
from models.accounting import Account, account
from models.backbone import build_backbone
from trainer.checkpoint import Draft, SaveFailure, collect, newest, publish
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine, StepResult
from trainer.evaluate import Evaluator
from trainer.heartbeat import Heartbeat
from trainer.ids import evaluation_id, run_id, trunk_id
from trainer.machine import gemm_peak_flops, memory_bytes, provenance
from trainer.manifest import CheckpointError, Found, inspect
from trainer.record import Row, RunRecord, read_run
from trainer.schedule import decay_begins
from trainer.schema import ConfigError, dump
from trainer.shared_stream import shared_batches

DEADLINES = {"start": 600.0, "data": 300.0, "step": 900.0, "save": 900.0, "evaluate": 1800.0}
"""Seconds that a phase may last before the stall report."""
STATUS_SECONDS = 0.5


@dataclass(frozen=True)
class Lineage:
    """Where a run stands among those that share its trunk.

    Attributes:
        forks: for a trunk, the steps whose checkpoints are kept for branches.
        trunk: for a branch, the folder of its trunk.
    """

    forks: frozenset[int] = field(default_factory=frozenset)
    trunk: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: at the budget, at the end of a trunk, early, or diverged."""

    state: Literal["done", "extended", "stopped", "diverged"]
    step: int
    message: str = ""


@dataclass
class TrainState:
    """What is carried from step to step, and through a checkpoint."""

    step: int = 0
    certificate: int = 0
    skipped_in_row: int = 0

    def facts(self, session: "Session") -> dict[str, object]:
        """As a checkpoint's manifest states it."""
        return {
            "tokens": self.step * session.config.optimizer.batch_tokens,
            "certificate": f"{self.certificate:016x}",
            "skipped_in_row": self.skipped_in_row,
            "trunk": trunk_id(session.config),
            "dataset_root_hash": session.root_hash,
            "layout": session.layout(),
        }


class Session:
    """The parts of one run, made from its configs; every rank has one, rank 0 holds the record."""

    def __init__(
        self,
        config: RunConfig,
        execution: ExecutionConfig,
        evaluation: EvaluationConfig,
        folder: Path,
        lineage: Lineage,
    ) -> None:
        self.config, self.execution, self.evaluation = config, execution, evaluation
        self.folder, self.lineage = folder, lineage
        self._data_root = Path(execution.data_root)
        self.root_hash = read_dataset(self._data_root / config.corpus.dataset).root_hash
        self.engine = Engine(build_backbone(config.model, config.seed), config, execution)
        self._group = self.engine.ranks.group()
        self._account: Account = account(config.model, config.corpus.seq_len)
        self._evaluator = Evaluator(config, evaluation, self._data_root)
        self._stream: TokenStream | None = None
        self._shown = 0.0
        self.record = RunRecord(folder) if self.engine.ranks.rank == 0 else None
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.engine.ranks.rank
        self.heartbeat = Heartbeat(folder, rank, DEADLINES, self.complain)
        self._tracker = None
        if self.record is not None:
            self._open_record(self.record)

    def resume(self) -> TrainState:
        """Take up the newest checkpoint: the run's own, else one of its trunk before the fork."""
        found = newest(self.folder / "checkpoints", self._group, None)
        if found is None and self.lineage.trunk is not None:
            found = self._find_fork(self.lineage.trunk)
        if found is None:
            self._refuse_rows_without_checkpoint()
            return TrainState()
        self._refuse_changes(found)
        self.engine.load(found.path)
        for rejected in found.rejected:
            self.complain(rejected.message)
        facts = found.manifest
        return TrainState(facts["step"], int(facts["certificate"], 16), facts["skipped_in_row"])

    def open_stream(self, first_step: int) -> Iterator[Batch]:
        """This rank's batches from a step on; what one rank cannot open stops all of them."""
        ranks, failed = self.engine.ranks, None
        try:
            if ranks.shard == 0:
                self._stream = TokenStream(
                    self.config.corpus,
                    self._data_root,
                    rank=ranks.data_rank,
                    ranks=ranks.data_ranks,
                    batch_sequences=self.config.batch_sequences,
                    first_step=first_step,
                )
        except (ValueError, RuntimeError, OSError) as error:
            failed = error
        for error in self._group.gather(failed):
            if error is not None:
                raise error
        sequences = self.config.batch_sequences // ranks.data_ranks
        return shared_batches(self._stream, ranks, (sequences, self.config.corpus.seq_len))

    def write_row(
        self, progress: TrainState, result: StepResult, rate: float, seconds: tuple[float, float]
    ) -> None:
        """Record one step."""
        if self.record is None:
            return
        took, waited = seconds
        batch = self.config.optimizer.batch_tokens
        speed = batch * self._account.training_flops_per_token / took
        row: Row = {
            "step": progress.step,
            "tokens": progress.step * batch,
            "learning_rate": rate,
            "loss_nats": result.loss_nats,
            "gradient_norm": result.gradient_norm,
            "skipped": result.skipped,
            "certificate": f"{progress.certificate:016x}",
            "step_seconds": took,
            "data_wait_seconds": waited,
            "tokens_per_second": batch / took,
            "flops_per_second": speed,
            "gemm_peak_share": speed / self._peak,
            "memory_bytes": memory_bytes(self.engine.device),
        }
        self.record.append_metrics(row)
        if self._tracker is not None:
            self._tracker.log(row)
        self._show(progress, loss_nats=result.loss_nats, tokens_per_second=batch / took)

    def save(self, progress: TrainState, *, pinned: bool) -> None:
        """Publish a checkpoint; a failure is told and training goes on."""
        self.heartbeat.beat(progress.step, "save")
        if self.record is not None:
            self.record.sync()
        draft = Draft(progress.step, progress.facts(self), pinned, self.engine.save)
        saved = publish(self.folder / "checkpoints", draft, self._group, self.record)
        if isinstance(saved, SaveFailure):
            self.complain(str(saved))
            return
        keep = self.execution.keep_checkpoints
        failure = collect(self.folder / "checkpoints", keep, self._group, self.record)
        if failure is not None:
            self.complain(str(failure))

    def evaluate(self, progress: TrainState) -> None:
        """Measure all sets, unless that was done; an error is a row, never the end of the run."""
        measured = evaluation_id(self.evaluation)
        tokens = progress.step * self.config.optimizer.batch_tokens
        row: Row = {"step": progress.step, "tokens": tokens, "evaluation_id": measured}
        done = {e["evaluation_set"] for e in self._evaluations(measured, progress.step)}
        if done >= set(self._evaluator.sets):
            return
        self.heartbeat.beat(progress.step, "evaluate")
        decayed = not self.lineage.forks and progress.step == self.config.steps
        row |= {"decayed": decayed, "certificate": f"{progress.certificate:016x}"}
        rows: list[Row] = []
        try:
            for result in self._evaluator.evaluate(self.engine):
                bits = {"bits_per_byte": result.bits_per_byte}
                rows.append({**row, **asdict(result), **bits})
                fault_point("evaluate.set_done")
        except (RuntimeError, OSError) as error:
            self.complain(f"evaluation at step {progress.step} failed: {error}")
            rows = [{**row, "error": str(error)}]
        if self.record is not None:
            self.record.append_evaluations(rows)

    def stop(self, progress: TrainState, name: str) -> Outcome:
        """End early, with everything saved."""
        message = f"stopped by {name or 'another rank'} at step {progress.step}"
        if self.record is not None:
            self.record.write_status("stopped", step=progress.step, message=message)
        return Outcome("stopped", progress.step, message)

    def diverge(self, progress: TrainState) -> Outcome:
        """End with a result: training left the finite numbers."""
        message = (
            f"non-finite for {progress.skipped_in_row} steps in a row at step {progress.step}, "
            f"{self.config.optimizer.max_skipped_steps} are allowed"
        )
        self._write_summary("diverged", progress, message)
        return Outcome("diverged", progress.step, message)

    def finish(self, progress: TrainState) -> Outcome:
        """End at the budget; a trunk gets no summary, since it may be extended."""
        if self.lineage.forks:
            if self.record is not None:
                self.record.write_status("extended", step=progress.step)
            return Outcome("extended", progress.step)
        self._write_summary("done", progress, "")
        return Outcome("done", progress.step)

    def complain(self, message: str) -> None:
        """Leave a line where a person finds it: among the run's warnings."""
        with (self.folder / "warnings.txt").open("a") as file:
            file.write(message + "\n")

    def layout(self) -> dict[str, object]:
        """What may not change between a checkpoint and its resumption."""
        execution = self.execution
        return {"ranks": execution.ranks, "zero_stage": execution.zero_stage}

    def close(self) -> None:
        """Free everything, so that another run can follow in this process."""
        if self._stream is not None:
            self._stream.close()
        if self._tracker is not None:
            self._tracker.close()
        if self.record is not None:
            self.record.close()
        self.engine.close()

    def _open_record(self, record: RunRecord) -> None:
        self._peak = gemm_peak_flops(self.engine.device, self.engine.product_dtype)
        record.write_config(dump(self.config))
        record.write_provenance(
            {
                "run_id": run_id(self.config),
                "trunk_id": trunk_id(self.config),
                "decay_begins": decay_begins(self.config),
                "evaluation_id": evaluation_id(self.evaluation),
                "accounting": asdict(self._account),
                "dataset_root_hash": self.root_hash,
                "execution": dump(self.execution),
                "gemm_peak_flops": self._peak,
                **provenance(),
            }
        )
        if self.execution.tracker == "wandb":
            from trainer.tracker import Tracker

            self._tracker = Tracker(self.folder.name, self.folder, dump(self.config))

    def _find_fork(self, trunk: Path) -> Found | None:
        """Rank 0 looks and decides for all: a live trunk may collect folders meanwhile."""
        fork = decay_begins(self.config)
        found = None
        if self._group.rank == 0:
            found = inspect(trunk / "checkpoints", lambda facts: facts["step"] <= fork)
        return self._group.gather(found)[0]

    def _refuse_rows_without_checkpoint(self) -> None:
        rows = read_run(self.folder).metrics if self.record is not None else []
        every = self.execution.save_every_tokens
        if rows and every and rows[-1]["tokens"] > 2 * every:  # type: ignore[operator]
            raise CheckpointError(
                "missing",
                f"run {self.folder.name} has metrics to step {rows[-1]['step']} but no checkpoint; "
                f"delete {self.folder} to train it anew",
            )

    def _refuse_changes(self, found: Found) -> None:
        for key, now in (("layout", self.layout()), ("dataset_root_hash", self.root_hash)):
            then = found.manifest[key]
            if then != now:
                raise ConfigError(
                    f"{found.path} was made with {key} {then}, but the run now has {now}; "
                    "go back to that, or move the run folder away to train it anew"
                )

    def _evaluations(self, measured: str, step: int) -> list[Row]:
        rows = (r for r in read_run(self.folder).evaluations if r["step"] == step)
        return [r for r in rows if r["evaluation_id"] == measured and not r.get("error")]

    def _write_summary(self, state: str, progress: TrainState, message: str) -> None:
        weights = self.engine.weights()
        if self.record is None:
            return
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode())
            digest.update(weights[name].numpy().tobytes())
        summary: Mapping[str, object] = {
            "state": state,
            "step": progress.step,
            "tokens": progress.step * self.config.optimizer.batch_tokens,
            "certificate": f"{progress.certificate:016x}",
            "parameters_sha256": digest.hexdigest(),
            "read_blocks": self._realised(),
            "message": message,
        }
        self.record.write_summary(summary)
        self.record.write_status(state, step=progress.step, steps=self.config.steps)

    def _realised(self) -> dict[str, dict[str, int]]:
        """Blocks, different blocks and most repeats of each domain, over all ranks."""
        assert self._stream is not None
        return {domain: asdict(read) for domain, read in self._stream.realised().items()}

    def _show(self, progress: TrainState, **facts: float) -> None:
        now = time.monotonic()
        if self.record is not None and now - self._shown > STATUS_SECONDS:
            self._shown = now
            steps = self.config.steps
            self.record.write_status("running", step=progress.step, steps=steps, **facts)
