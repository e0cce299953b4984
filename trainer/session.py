"""One run while it is trained: its engine, stream, checkpoints and evaluations."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from data_pipelines.batch import Batch
from data_pipelines.fault_points import fault_point
from data_pipelines.stream import TokenStream
from models.backbone import build_backbone
from trainer.checkpoint import Draft, SaveError, SaveFailure, collect, newest, publish
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine
from trainer.evaluate import Evaluator
from trainer.exit_codes import ExitCode
from trainer.failures import failure_of
from trainer.heartbeat import Heartbeat
from trainer.identity import require_same
from trainer.ids import dataset_ids, evaluation_id, run_id, trunk_id, weights_ids
from trainer.manifest import CheckpointError, Found, inspect, step_name
from trainer.peers import Peers, own_place
from trainer.record import Row, read_run
from trainer.record_checks import broken_seal, read_whole_run
from trainer.run_log import RunLog
from trainer.schedule import decay_begins
from trainer.schema import ConfigError, dump, load
from trainer.shared_stream import shared_batches
from trainer.train_state import TrainState
from untrusted.paths import inside

T = TypeVar("T")
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
        self._dataset = dataset_ids(config.corpus, self._data_root)
        self.engine = Engine(build_backbone(config.model, config.seed), config, execution)
        self._group = self.engine.ranks.group()
        own = own_place(self._group.rank)
        self._peers = Peers(own, self._group.gather(own))
        self._evaluator = Evaluator(config, evaluation, self._data_root)
        self._stream: TokenStream | None = None
        self.log = RunLog(folder, config, self.engine)
        self.heartbeat = Heartbeat(folder, self.engine.ranks.rank, DEADLINES, self.log.warn)

    def resume(self) -> TrainState:
        """Load the newest checkpoint: the run's own, else the trunk's at or before the fork.

        The record is opened last: what a refused start was made of must not enter it.
        """
        self._on_first_rank(self._refuse_another_run)
        state = self._load_newest()
        self.log.open(self.execution, self.evaluation, self._dataset)
        return state

    def _load_newest(self) -> TrainState:
        found = newest(self.folder / "checkpoints", self._group, self._check(self.folder))
        if found is None and self.lineage.trunk is not None:
            found = self._find_fork(self.lineage.trunk)
        if found is None:
            self._on_first_rank(self._refuse_lost_checkpoints)
            return TrainState()
        self._refuse_other_layout(found)
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

    def save(self, state: TrainState, *, pinned: bool, required: bool) -> None:
        """Publish a checkpoint; if it is not required, a failure is a warning.

        Raises:
            SaveError: one that is required could not be saved; the same on every rank.
        """
        self.heartbeat.beat(state.step, "save")
        # Rows first: a checkpoint must never be ahead of the metrics that led to it.
        self.log.sync()
        draft = Draft(state.step, self._facts(state), pinned, self.engine.save)
        saved = publish(self.folder / "checkpoints", draft, self._group, self.log.record)
        if isinstance(saved, SaveFailure):
            if required:
                raise SaveError(saved)
            self.log.warn(f"{saved}; training goes on, and the next save tries again")
            return
        if self.log.record is not None:
            self.log.record.note_saved()
        keep = self.execution.keep_checkpoints
        failure = collect(self.folder / "checkpoints", keep, self._group, self.log.record)
        if failure is not None:
            self.log.warn(str(failure))

    def evaluate(self, state: TrainState) -> None:
        """Measure all sets unless that was done; an error becomes a row and training goes on."""
        measured = evaluation_id(self.evaluation)
        tokens = state.step * self.config.optimizer.batch_tokens
        row: Row = {"step": state.step, "tokens": tokens, "evaluation_id": measured}
        decayed = not self.lineage.forks and state.step == self.config.steps
        done = {(e["evaluation_set"], e["subset"]) for e in self._evaluations(measured, state.step)}
        parts = (True, False) if decayed else (True,)
        if done >= {(name, subset) for name in self._evaluator.sets for subset in parts}:
            return
        self.heartbeat.beat(state.step, "evaluate")
        row |= {"decayed": decayed, "certificate": state.certificate_hex}
        if self.config.optimizer.ema_decay is not None:
            row["averaged"] = True
        rows: list[Row] = []
        documents: dict[str, dict] = {}
        try:
            with self.engine.result_weights():
                for result in self._evaluator.evaluate(self.engine, final=decayed):
                    rows.append({**row, **result.row()})
                    if not result.figures.subset:
                        documents[result.figures.evaluation_set] = result.documents()
                    fault_point("evaluate.set_done")
        except (RuntimeError, OSError) as error:
            self.log.warn(f"evaluation at step {state.step} failed: {error}")
            rows.append({**row, "error": str(error)})
        self.log.write_evaluations(rows, documents)

    def stop(self, state: TrainState, name: str) -> Outcome:
        """End early; the checkpoint was saved before."""
        message = f"stopped by {name or 'another rank'} at step {state.step}"
        self.log.write_status("stopped", state, message=message)
        return Outcome("stopped", state.step, message)

    def fail(self, error: Exception) -> Exception:
        """Record why the run ends early, where the disk still allows it; returns the cause."""
        cause = self._peers.explain(error)
        self.log.write_failure(failure_of(cause, ExitCode.FAILED).reason)
        return cause

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
            **weights_ids(self.config, dump(self.config), state.step),
            **self._dataset,
            "layout": self.layout(),
            "rows": self.log.seals,
        }

    def _find_fork(self, trunk: Path) -> Found | None:
        """Rank 0 searches for all ranks: a trunk that is still training may delete checkpoints."""
        fork, whole = decay_begins(self.config), self._check(trunk)
        return self._on_first_rank(
            lambda: inspect(
                trunk / "checkpoints", lambda facts: facts["step"] <= fork and whole(facts)
            )
        )

    def _on_first_rank(self, act: Callable[[], T]) -> T | None:
        """What rank 0 finds, on every rank; an error of its is raised on all of them."""
        found: T | Exception | None = None
        if self._group.rank == 0:
            try:
                found = act()
            except (ValueError, RuntimeError, OSError) as error:
                found = error
        found = self._group.gather(found)[0]
        if isinstance(found, Exception):
            raise found
        return found

    def _refuse_another_run(self) -> None:
        """Check that the folder is new, or of this run; of a trunk the budget may have grown."""
        stored = read_whole_run(self.folder).config
        if stored:
            require_same(
                str(self.folder / "config.yaml"),
                self._run_ids(load(RunConfig, stored)),
                self._run_ids(self.config),
                of="the run that was asked for",
                remedy=f"restore that file, or move {self.folder} away",
            )

    def _run_ids(self, config: RunConfig) -> dict[str, str]:
        """What the folder's config must state; a trunk's budget grows with its horizons."""
        ids = {"trunk": trunk_id(config)}
        return ids if self.lineage.forks else {**ids, "run": run_id(config)}

    def _refuse_lost_checkpoints(self) -> None:
        """Check that checkpoints were not removed; where no save succeeded, rows are made anew."""
        record = self.log.record
        if record is not None and record.saved:
            raise CheckpointError(
                "missing",
                f"run {self.folder.name} has saved checkpoints, but none is there; restore them, "
                f"or delete {self.folder} to train it from scratch",
            )

    def _check(self, folder: Path) -> Callable[[dict], bool]:
        """A check of the checkpoints in a folder: they are of this run, and its rows are there.

        One whose rows were lost counts as damaged: an earlier one, whose rows are there, makes
        them anew.
        """

        def check(manifest: dict) -> bool:
            name = step_name(manifest["step"])
            ids = weights_ids(self.config, dump(self.config), manifest["step"])
            require_same(
                str(inside(folder, "checkpoints", name)),
                manifest,
                {**ids, **self._dataset},
                of=f"run {self.folder.name}",
                remedy=f"move {name} away, or restore what was there",
            )
            damage = broken_seal(folder, manifest.get("rows") or {})
            if damage:
                raise CheckpointError("rows", f"{name}: {damage}")
            return True

        return check

    def _refuse_other_layout(self, found: Found) -> None:
        then, now = found.manifest["layout"], self.layout()
        if then != now:
            raise ConfigError(
                f"{found.path} was made with layout {then}, but the run now has {now}; "
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
