"""One run while it is trained: its engine, stream, checkpoints and evaluations."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data_pipelines.batch import Batch
from data_pipelines.fault_points import fault_point
from data_pipelines.manifest import read_manifest as read_dataset
from data_pipelines.stream import TokenStream
from models.backbone import build_backbone
from trainer.checkpoint import Draft, SaveFailure, collect, newest, publish
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine
from trainer.evaluate import Evaluator
from trainer.heartbeat import Heartbeat
from trainer.ids import evaluation_id, trunk_id
from trainer.manifest import CheckpointError, Found, inspect
from trainer.record import Row, number, read_run
from trainer.run_log import RunLog
from trainer.schedule import decay_begins
from trainer.schema import ConfigError
from trainer.shared_stream import shared_batches
from trainer.train_state import TrainState
from untrusted.paths import inside

DEADLINES = {"start": 600.0, "data": 300.0, "step": 900.0, "save": 900.0, "evaluate": 1800.0}
"""Seconds that a phase may last before the stall report."""


@dataclass(frozen=True)
class Lineage:
    """How a run relates to those that share its trunk.

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


class Session:
    """The parts of one run, made from its configs; every rank has one."""

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
        self.root_hash = read_dataset(inside(self._data_root, config.corpus.dataset)).root_hash
        self.engine = Engine(build_backbone(config.model, config.seed), config, execution)
        self._group = self.engine.ranks.group()
        self._evaluator = Evaluator(config, evaluation, self._data_root)
        self._stream: TokenStream | None = None
        self.log = RunLog(folder, config, self.engine)
        self.log.open(execution, evaluation, self.root_hash)
        self.heartbeat = Heartbeat(folder, self.engine.ranks.rank, DEADLINES, self.log.warn)

    def resume(self) -> TrainState:
        """Load the newest checkpoint: the run's own, else the trunk's at or before the fork."""
        found = newest(self.folder / "checkpoints", self._group, None)
        if found is None and self.lineage.trunk is not None:
            found = self._find_fork(self.lineage.trunk)
        if found is None:
            self._refuse_rows_without_checkpoint()
            return TrainState()
        self._refuse_changes(found)
        self.engine.load(found.path)
        for rejected in found.rejected:
            self.log.warn(rejected.message)
        return TrainState.of_manifest(found.manifest)

    def open_stream(self, first_step: int) -> Iterator[Batch]:
        """This rank's batches from a step on; an error on one rank is raised on all of them."""
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

    def save(self, state: TrainState, *, pinned: bool) -> None:
        """Publish a checkpoint; after a failure there is a warning and training goes on."""
        self.heartbeat.beat(state.step, "save")
        # Rows first: a checkpoint must never be ahead of the metrics that led to it.
        self.log.sync()
        draft = Draft(state.step, self._facts(state), pinned, self.engine.save)
        saved = publish(self.folder / "checkpoints", draft, self._group, self.log.record)
        if isinstance(saved, SaveFailure):
            self.log.warn(str(saved))
            return
        keep = self.execution.keep_checkpoints
        failure = collect(self.folder / "checkpoints", keep, self._group, self.log.record)
        if failure is not None:
            self.log.warn(str(failure))

    def evaluate(self, state: TrainState) -> None:
        """Measure all sets unless that was done; an error becomes a row and training goes on."""
        measured = evaluation_id(self.evaluation)
        tokens = state.step * self.config.optimizer.batch_tokens
        row: Row = {"step": state.step, "tokens": tokens, "evaluation_id": measured}
        done = {e["evaluation_set"] for e in self._evaluations(measured, state.step)}
        if done >= set(self._evaluator.sets):
            return
        self.heartbeat.beat(state.step, "evaluate")
        decayed = not self.lineage.forks and state.step == self.config.steps
        row |= {"decayed": decayed, "certificate": state.certificate_hex}
        rows: list[Row] = []
        try:
            for result in self._evaluator.evaluate(self.engine):
                bits = {"bits_per_byte": result.bits_per_byte}
                rows.append({**row, **asdict(result), **bits})
                fault_point("evaluate.set_done")
        except (RuntimeError, OSError) as error:
            self.log.warn(f"evaluation at step {state.step} failed: {error}")
            rows = [{**row, "error": str(error)}]
        self.log.write_evaluations(rows)

    def stop(self, state: TrainState, name: str) -> Outcome:
        """End early; the checkpoint was saved before."""
        message = f"stopped by {name or 'another rank'} at step {state.step}"
        self.log.write_status("stopped", state, message=message)
        return Outcome("stopped", state.step, message)

    def diverge(self, state: TrainState) -> Outcome:
        """End with a result: the loss or the gradient is not finite."""
        message = (
            f"non-finite for {state.skipped_in_row} steps in a row at step {state.step}, "
            f"{self.config.optimizer.max_skipped_steps} are allowed"
        )
        self._summarize("diverged", state, message)
        return Outcome("diverged", state.step, message)

    def finish(self, state: TrainState) -> Outcome:
        """End at the budget; a trunk gets no summary, since it may be extended."""
        if self.lineage.forks:
            self.log.write_status("extended", state)
            return Outcome("extended", state.step)
        self._summarize("done", state, "")
        return Outcome("done", state.step)

    def layout(self) -> dict[str, object]:
        """What must be the same when a checkpoint is resumed."""
        execution = self.execution
        return {"ranks": execution.ranks, "zero_stage": execution.zero_stage}

    def close(self) -> None:
        """Free everything, so that another run can follow in this process."""
        if self._stream is not None:
            self._stream.close()
        self.log.close()
        self.engine.close()

    def _facts(self, state: TrainState) -> dict[str, object]:
        """What a checkpoint's manifest says of the run."""
        return {
            "tokens": state.step * self.config.optimizer.batch_tokens,
            "certificate": state.certificate_hex,
            "skipped_in_row": state.skipped_in_row,
            "trunk": trunk_id(self.config),
            "dataset_root_hash": self.root_hash,
            "layout": self.layout(),
        }

    def _find_fork(self, trunk: Path) -> Found | None:
        """Rank 0 searches for all ranks: a trunk that is still training may delete checkpoints."""
        fork = decay_begins(self.config)
        found = None
        if self._group.rank == 0:
            found = inspect(trunk / "checkpoints", lambda facts: facts["step"] <= fork)
        return self._group.gather(found)[0]

    def _refuse_rows_without_checkpoint(self) -> None:
        rows = read_run(self.folder).metrics if self.log.record is not None else []
        every = self.execution.save_every_tokens
        if rows and every and number(rows[-1], "tokens") > 2 * every:
            raise CheckpointError(
                "missing",
                f"run {self.folder.name} has metrics to step {rows[-1]['step']} but no checkpoint; "
                f"delete {self.folder} to train it from scratch",
            )

    def _refuse_changes(self, found: Found) -> None:
        for key, now in (("layout", self.layout()), ("dataset_root_hash", self.root_hash)):
            then = found.manifest[key]
            if then != now:
                raise ConfigError(
                    f"{found.path} was made with {key} {then}, but the run now has {now}; "
                    "go back to that, or move the run folder away to train from scratch"
                )

    def _evaluations(self, measured: str, step: int) -> list[Row]:
        rows = (r for r in read_run(self.folder).evaluations if r["step"] == step)
        return [r for r in rows if r["evaluation_id"] == measured and not r.get("error")]

    def _summarize(self, status: str, state: TrainState, message: str) -> None:
        # Under ZeRO-3 gathering the weights is a collective, which every rank must enter.
        weights = self.engine.weights()
        if self.log.record is not None:
            assert self._stream is not None, "rank 0 reads its own sequences"
            read = {domain: asdict(each) for domain, each in self._stream.realised().items()}
            self.log.write_summary(status, state, weights, read_blocks=read, message=message)
