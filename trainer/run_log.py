"""What a run writes down while it is trained: its record, its tracker and its warnings."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from models.accounting import account
from trainer.append_file import append_line_shared
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine, StepResult
from trainer.identity import config_hash
from trainer.ids import evaluation_id, run_id, trunk_id
from trainer.machine import gemm_peak_flops, memory_bytes, provenance
from trainer.manifest import hash_weights
from trainer.record import Row, RunRecord, Scalar
from trainer.schedule import decay_begins
from trainer.schema import dump
from trainer.train_state import TrainState

STATUS_SECONDS = 0.5


class RunLog:
    """Rank 0 holds the record and writes it; on other ranks all but warnings do nothing.

    Attributes:
        record: of the run; None on ranks above 0.
    """

    def __init__(self, folder: Path, config: RunConfig, engine: Engine) -> None:
        self._folder, self._config, self._engine = folder, config, engine
        self._batch = config.optimizer.batch_tokens
        self._account = account(config.model, config.corpus.seq_len)
        self._shown = 0.0
        self._tracker = None
        self.record = RunRecord(folder) if engine.ranks.rank == 0 else None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seals(self) -> dict[str, dict]:
        """Length and hash of all rows so far; empty on ranks above 0."""
        return {} if self.record is None else self.record.seals

    def open(
        self,
        execution: ExecutionConfig,
        evaluation: EvaluationConfig,
        dataset: Mapping[str, str],
    ) -> None:
        """Write down what the run is and what it is made with, and start the tracker."""
        if self.record is None:
            return
        self._peak = gemm_peak_flops(self._engine.device, self._engine.product_dtype)
        self.record.write_config(dump(self._config))
        self.record.write_provenance(
            {
                "run_id": run_id(self._config),
                "trunk_id": trunk_id(self._config),
                "config_sha256": config_hash(dump(self._config)),
                "decay_begins": decay_begins(self._config),
                "evaluation_id": evaluation_id(evaluation),
                "accounting": asdict(self._account),
                **dataset,
                "execution": dump(execution),
                "gemm_peak_flops": self._peak,
                **provenance(),
            }
        )
        if execution.tracker == "wandb":
            self._beside(self._start_tracker)

    def write_step(
        self, state: TrainState, result: StepResult, rate: float, seconds: tuple[float, float]
    ) -> None:
        """Record one step.

        Args:
            state: after the step.
            result: of the step, from the engine.
            rate: its learning rate.
            seconds: that the step took, and of these that it waited for data.
        """
        if self.record is None:
            return
        took, waited = seconds
        speed = self._batch * self._account.training_flops_per_token / took
        row: Row = {
            "step": state.step,
            "tokens": state.step * self._batch,
            "learning_rate": rate,
            "loss_nats": result.loss_nats,
            "gradient_norm": result.gradient_norm,
            "skipped": result.skipped,
            "certificate": state.certificate_hex,
            "step_seconds": took,
            "data_wait_seconds": waited,
            "tokens_per_second": self._batch / took,
            "flops_per_second": speed,
            "gemm_peak_share": speed / self._peak,
            "memory_bytes": memory_bytes(self._engine.device),
        }
        self.record.append_metrics(row)
        if self._tracker is not None:
            tracker = self._tracker
            self._beside(lambda: tracker.log(row))
        now = time.monotonic()
        # The status file is replaced with an fsync, which small steps must not wait for each time.
        if now - self._shown > STATUS_SECONDS:
            self._shown = now
            facts = {"loss_nats": result.loss_nats, "tokens_per_second": self._batch / took}
            self.write_status("running", state, steps=self._config.steps, **facts)

    def write_evaluations(self, rows: list[Row], documents: Mapping[str, Mapping]) -> None:
        """Record the sets that were evaluated at one step, by document where there are such.

        Args:
            rows: one a set, all with the same evaluation id and step.
            documents: set -> nats and targets of each of its documents.
        """
        if self.record is None:
            return
        # Documents first: rows say that a set is done.
        if documents:
            measured, step = str(rows[0]["evaluation_id"]), int(rows[0]["step"] or 0)
            self.record.write_documents(measured, step, documents)
        self.record.append_evaluations(rows)

    def write_status(self, status: str, state: TrainState, **facts: Scalar) -> None:
        """Replace the status file."""
        if self.record is not None:
            self.record.write_status(status, step=state.step, **facts)

    def write_summary(
        self, status: str, state: TrainState, weights: Mapping[str, Tensor], **facts: object
    ) -> None:
        """Record the end of the run, with a hash of its final weights."""
        if self.record is None:
            return
        summary: Mapping[str, object] = {
            "state": status,
            "step": state.step,
            "tokens": state.step * self._batch,
            "certificate": state.certificate_hex,
            "parameters_sha256": hash_weights(weights),
            "rows": self.record.seals,
            **facts,
        }
        self.record.write_summary(summary)
        self.write_status(status, state, steps=self._config.steps)

    def sync(self) -> None:
        """Bring every row to the disk."""
        if self.record is not None:
            self.record.sync()

    def write_failure(self, reason: str) -> None:
        """Set the status to failed; what the disk refuses is a warning, since the run ends."""
        if self.record is not None:
            try:
                self.record.write_failure(reason)
            except OSError as error:
                self.warn(f"the status cannot be set to failed: {error}")

    def warn(self, message: str) -> None:
        """Add a line to the run's warnings and to the terminal or job log; any rank may."""
        text = f"warning: {self._folder.name}: {message}\n"
        sys.stderr.write(text)
        try:
            append_line_shared(self._folder / "warnings.txt", message + "\n")
        except OSError as error:
            sys.stderr.write(f"warning: it is not in warnings.txt either: {error}\n")

    def close(self) -> None:
        """Flush everything and give the run back."""
        if self._tracker is not None:
            self._beside(self._tracker.close)
        if self.record is not None:
            self.record.close()

    def _start_tracker(self) -> None:
        # Imported here, since it takes a second to load and few runs use it.
        from trainer.tracker import Tracker

        self._tracker = Tracker(self._folder.name, self._folder, dump(self._config))

    def _beside(self, act: Callable[[], None]) -> None:
        """Do something with the tracker; whatever it raises, training goes on without it."""
        try:
            act()
        except Exception as error:  # noqa: BLE001
            self._tracker = None
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.warn(f"wandb has failed ({text}); the run goes on, and its record has every row")
