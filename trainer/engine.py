"""The only file that knows DeepSpeed: one optimizer step, and its state on disk."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.batch import Batch
from kernels.dispatch import warm as warm_kernels
from kernels.extension_cache import use_extension_cache
from models.backbone import Backbone, Source
from models.compiled import compile_blocks
from models.mixer import refuse_unsharded
from models.sequences.sharded import ShardedSequence
from models.sequences.whole import WholeSequence
from trainer.average import WeightAverage
from trainer.config import ExecutionConfig, RunConfig, check_layout, sequences_at_once
from trainer.machine import keep_freed_memory
from trainer.manifest import MODEL_FILE, refuse_unsafe
from trainer.objective import IGNORED, prepare, total_losses
from trainer.optimizer import build_optimizer
from trainer.parallel import join_ranks

STATE_FOLDER = "deepspeed"
STATE_TAG = "state"
BUCKET_ELEMENTS = 200_000_000


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on all ranks.

    Attributes:
        loss_nats: mean cross-entropy over the targets of the global batch, without z-loss.
        gradient_norm: global norm before clipping, of all that is minimised.
        skipped: whether the update was skipped because of a non-finite loss or gradient.
    """

    loss_nats: float
    gradient_norm: float
    skipped: bool


class Engine:
    """A backbone with its optimizer, on the ranks of one run."""

    def __init__(self, backbone: Backbone, config: RunConfig, execution: ExecutionConfig) -> None:
        self.device = pick_device(execution)
        check_layout(config, execution)
        self._micro = sequences_at_once(config, execution)
        if execution.sequence_parallel > 1:
            refuse_unsharded(backbone)
        self.ranks = join_ranks(self.device, execution.ranks, execution.sequence_parallel)
        self._config = config
        self._stage = execution.zero_stage
        self._clip = config.optimizer.gradient_clip
        if self.device == "cuda":
            torch.cuda.set_device(self.ranks.local_rank)
        backbone.to(self.device)
        for stack in (backbone, backbone.encoder):
            if stack is not None:
                stack.recompute = execution.recompute
        if execution.compile:
            compile_blocks(backbone)
        self._engine = _initialize(backbone, config, execution, self._micro)
        # Kept here, because a loaded state replaces the groups.
        self._multipliers = [g["rate_multiplier"] for g in self._engine.optimizer.param_groups]
        decay = config.optimizer.ema_decay
        self._average = None if decay is None else WeightAverage(backbone, decay)

    @property
    def backbone(self) -> Backbone:
        """The module that is trained."""
        return self._engine.module

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self._config.precision == "bf16" else torch.float32

    def step(self, batch: Batch, rate: float) -> StepResult:
        """Train on this rank's share of a global batch, in micro-batches.

        Args:
            batch: this rank's sequences, whole.
            rate: learning rate of this step.

        Raises:
            RuntimeError: the global batch has no target.
        """
        whole = prepare(batch, self._config, self._config.seed, self._config.mask_rate)
        batch = self.own_part(whole)
        (targets,) = self.ranks.sum_floats([float((batch.targets != IGNORED).sum())])
        if not targets:
            raise RuntimeError(
                f"no token of a global batch of {self._config.batch_sequences} sequences is to be "
                f"predicted by {self._config.objective}, so the step has no loss; check that the "
                "data has documents of more than one token, or raise optimizer.batch_tokens"
            )
        nats = 0.0
        for piece in batch.split(self._micro):
            nats += self._backward(piece, targets)
        (nats,) = self.ranks.sum_floats([nats])
        groups = self._engine.optimizer.param_groups
        for group, multiplier in zip(groups, self._multipliers, strict=True):
            group["lr"] = rate * multiplier
        norm, skipped = self._apply()
        if self._average is not None:
            self._average.update(self._engine.global_steps)
        return StepResult(nats / targets, norm, skipped)

    def result_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the backbone has the weights to evaluate: averages where there are any."""
        return contextlib.nullcontext() if self._average is None else self._average.in_place()

    def own_part(self, batch: Batch) -> Batch:
        """This rank's part of each sequence; all of it without sequence parallelism."""
        if self.ranks.sequence is None:
            return batch
        return batch.stretch(self.ranks.shard, self.ranks.shards)

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states of this rank's part of a batch, without gradients."""
        with torch.no_grad(), self.autocast():
            return self.backbone(*self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[Tensor, WholeSequence, Source | None]:
        sequence = self._sequence(batch.documents.to(self.device))
        source = None
        if batch.source is not None and batch.source_documents is not None:
            theirs = WholeSequence(batch.source_documents.to(self.device))
            source = Source(batch.source.to(self.device), theirs)
        return batch.tokens.to(self.device), sequence, source

    def _sequence(self, documents: Tensor) -> WholeSequence:
        if self.ranks.sequence is None:
            return WholeSequence(documents)
        return ShardedSequence(documents, self.ranks.sequence)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the run: bf16 products over fp32 weights, or nothing."""
        enabled = self._config.precision == "bf16"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=enabled):
            yield

    def save(self, folder: Path) -> None:
        """Write this rank's state into a folder; all ranks call it.

        DeepSpeed's save ends in a barrier. An error of one rank is raised after it, since peers
        would otherwise wait there for that rank.
        """
        weights = self.weights()
        failed: list[Exception] = []

        def try_to(write: Callable[[], object]) -> None:
            try:
                write()
            except (OSError, RuntimeError, SafetensorError) as error:
                failed.append(error)

        if self.ranks.rank == 0:
            try_to(lambda: save_file(weights, folder / MODEL_FILE))
        disk = self._engine.checkpoint_engine
        write = disk.save

        def guarded(state_dict: object, path: str) -> None:
            try_to(lambda: write(state_dict, path))

        disk.save = guarded
        try:
            place = str(folder / STATE_FOLDER)
            self._engine.save_checkpoint(place, tag=STATE_TAG, save_latest=False)
        finally:
            disk.save = write
        if failed:
            raise failed[0]

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote; all ranks call it.

        Raises:
            RuntimeError: DeepSpeed finds nothing to load.
        """
        for file in sorted((folder / STATE_FOLDER / STATE_TAG).iterdir()):
            refuse_unsafe(file)
        path, _ = self._engine.load_checkpoint(str(folder / STATE_FOLDER), tag=STATE_TAG)
        if path is None:
            raise RuntimeError(f"{folder} holds no state that DeepSpeed can load; delete it")
        if self._average is not None:
            self._average.load(load_file(folder / MODEL_FILE))

    def weights(self) -> dict[str, Tensor]:
        """The run's result in float32 on the CPU: its weights, or their averages if it has any.

        Gathered where ZeRO-3 shards them.
        """
        if self._stage < 3:
            own = self._average.weights.items() if self._average is not None else None
            named = own or self.backbone.named_parameters()
            return {n: p.detach().float().cpu().contiguous() for n, p in named}
        gathered = self._engine._zero3_consolidated_16bit_state_dict()
        return {n: w.float().cpu().contiguous() for n, w in (gathered or {}).items()}

    def close(self) -> None:
        """Free what DeepSpeed holds, so that another run can start in this process."""
        self._engine.destroy()

    def _backward(self, piece: Batch, targets: float) -> float:
        hidden = self._engine(*self._inputs(piece))
        with self.autocast():
            losses = total_losses(
                self.backbone, hidden, piece.targets.to(self.device), self._config.z_loss
            )
        # DeepSpeed divides by the accumulation steps and averages over all ranks. The loss is a sum
        # over the global batch, of which each rank holds a part, so both are undone here.
        pieces = self._engine.gradient_accumulation_steps() * self.ranks.ranks
        self._engine.backward(losses.minimised * (pieces / targets))
        last = self._engine.is_gradient_accumulation_boundary()
        if not last:
            self._engine.step()
        return float(losses.nats.detach())

    def _apply(self) -> tuple[float, bool]:
        """Step the optimizer; without ZeRO, clip and skip non-finite gradients here."""
        if self._stage > 0:
            before = self._engine.skipped_steps
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm() or 0.0)
            return norm, self._engine.skipped_steps > before
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        finite = math.isfinite(norm)
        if finite and norm > self._clip:
            torch.nn.utils.clip_grads_with_norm_(
                self.backbone.parameters(), self._clip, torch.tensor(norm)
            )
        if not finite:
            # DeepSpeed cannot skip an update without ZeRO, but weights without gradients stay.
            self.backbone.zero_grad(set_to_none=True)
        self._engine.step()
        return norm, not finite


def pick_device(execution: ExecutionConfig) -> str:
    """The configured device; for `auto`, `cuda` if there is one, else `cpu`."""
    if execution.device != "auto":
        return execution.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_process(execution: ExecutionConfig) -> None:
    """Set what holds for a whole process: threads, memory, denormals, determinism, accelerator.

    Freed memory is kept for speed, except under sequence parallelism, whose purpose is to save it.
    """
    device = pick_device(execution)
    if device == "cpu" and execution.sequence_parallel == 1:
        keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", device)
    use_extension_cache()
    torch.set_num_threads(execution.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(device == "cpu")


def warm() -> None:
    """Build and load in advance what the first run would otherwise have to."""
    prepare_process(ExecutionConfig(device="cpu"))
    warm_kernels()
    join_ranks("cpu", 1)
    _deepspeed().init_distributed(dist_init_required=False)


def _deepspeed() -> Any:  # noqa: ANN401
    """DeepSpeed, imported late: it takes seconds, and picks the accelerator at import."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # Its shared-memory all-reduce is compiled at the first start. A killed build leaves a lock that
    # hangs every later one, and its ranks wait by spinning on cores that others may need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _initialize(
    backbone: Backbone, config: RunConfig, execution: ExecutionConfig, micro: int
) -> Any:  # noqa: ANN401
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    parameters = sum(p.numel() for p in backbone.parameters())
    engine, _, _, _ = deepspeed.initialize(
        model=backbone,
        optimizer=build_optimizer(backbone, config),
        config=_deepspeed_config(config, execution, micro, parameters),
    )
    return engine


def _deepspeed_config(
    config: RunConfig, execution: ExecutionConfig, micro: int, parameters: int
) -> dict[str, object]:
    """Every key is written here, because DeepSpeed silently accepts misspelt ones."""
    stage = execution.zero_stage
    bucket = min(parameters, BUCKET_ELEMENTS)
    return {
        # DeepSpeed treats every rank as data-parallel, and shards ZeRO's states over all of them.
        "train_batch_size": config.batch_sequences * execution.sequence_parallel,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch_sequences // execution.data_ranks // micro,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            # The default of 5e8 elements is allocated at every backward, whatever the model's size.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.optimizer.gradient_clip if stage > 0 else 0.0,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 1_000_000_000,
    }
