"""What a run is and how it is executed: the config classes and the ids that follow from them.

`RunConfig` says what is trained and is hashed into the run id. `ExecutionConfig` says how and may
change a number only by rounding. `EvaluationConfig` says what is measured of a checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipelines.config import DataConfig
from models.backbone import BackboneConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its batch.

    Attributes:
        learning_rate: peak rate of the rung, the same for all architectures.
        learning_rate_scale: the architecture's own factor on it.
        batch_tokens: tokens a step, over all ranks and accumulated micro-batches.
        gradient_clip: largest global gradient norm; larger ones are scaled down to it.
        max_skipped_steps: non-finite steps in a row that are survived; one more ends the run.
    """

    learning_rate: float
    batch_tokens: int
    learning_rate_scale: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    gradient_clip: float = 1.0
    max_skipped_steps: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "batch_tokens", "learning_rate_scale", "eps")
        _require_positive(self, "gradient_clip")
        _require_within(self, 0, 1, "beta1", "beta2")
        _require_within(self, 0, math.inf, "weight_decay", "max_skipped_steps")


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, stable, decay (Hu et al. 2024, section 4).

    Attributes:
        warmup_tokens: tokens over which the rate rises linearly from 0; the same at all horizons.
        decay_fraction: last share of the budget, over which the rate falls linearly; 0 for none.
        final_share: share of the peak rate at the end of the decay.
    """

    warmup_tokens: int
    decay_fraction: float = 0.2
    final_share: float = 0.0

    def __post_init__(self) -> None:
        _require_within(self, 0, math.inf, "warmup_tokens")
        _require_within(self, 0, 1, "decay_fraction", "final_share")


@dataclass(frozen=True)
class BudgetConfig:
    """How long a run trains.

    Attributes:
        tokens: its horizon; a whole number of batches.
    """

    tokens: int

    def __post_init__(self) -> None:
        _require_positive(self, "tokens")


Objective = Literal["causal_lm", "masked_lm", "seq2seq"]
FORMS: Mapping[str, tuple[str, bool]] = {
    "causal_lm": ("decoder", False),
    "masked_lm": ("encoder", False),
    "seq2seq": ("decoder", True),
}
"""The form of backbone that each objective needs, and whether it reads a source."""


@dataclass(frozen=True)
class RunConfig:
    """What is trained. Its hash is the run id.

    Attributes:
        architecture: name of the architecture in the study.
        rung: name of the size in the study.
        nominal_parameters: size of the rung that budgets and rates are derived from.
        precision: fp32, or bf16 for bf16 products over fp32 weights.
        objective: next tokens; hidden tokens (an encoder's); a hidden span, written by a decoder
            after an encoder has read the rest. The last two hide with the vocabulary's last id.
        mask_rate: share of the tokens that the objective hides in training.
    """

    architecture: str
    rung: str
    nominal_parameters: int
    model: BackboneConfig
    corpus: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    budget: BudgetConfig
    precision: Literal["fp32", "bf16"]
    seed: int
    objective: Objective = "causal_lm"
    mask_rate: float = 0.3

    def __post_init__(self) -> None:
        _require_within(self, 0, 1, "mask_rate")
        self._check_form()
        self._check_lengths()
        self._check_exact()
        if self.optimizer.batch_tokens % self.corpus.seq_len:
            raise ValueError(
                f"optimizer.batch_tokens {self.optimizer.batch_tokens} is not a multiple of "
                f"corpus.seq_len {self.corpus.seq_len}; choose one"
            )
        if self.budget.tokens % self.optimizer.batch_tokens:
            below = self.budget.tokens // self.optimizer.batch_tokens
            raise ValueError(
                f"budget.tokens {self.budget.tokens} is not a whole number of batches of "
                f"{self.optimizer.batch_tokens} tokens; the nearest is "
                f"{max(below, 1) * self.optimizer.batch_tokens}"
            )

    def _check_form(self) -> None:
        wanted = FORMS[self.objective]
        has = (self.model.form, self.model.encoder is not None)
        if has != wanted:
            raise ValueError(
                f"objective {self.objective} needs {_describe(*wanted)}, but model is "
                f"{_describe(*has)}; change the objective, or model.form and model.encoder"
            )

    def _check_exact(self) -> None:
        for name, block in self.model.blocks.items():
            reason = getattr(block.mixer, "approximate_reason", "")
            if reason:
                raise ValueError(
                    f"model.blocks.{name}.mixer is for evaluation only ({reason}); train with an "
                    "exact mixer and swap this one in afterwards"
                )

    def _check_lengths(self) -> None:
        limits = {"model.learned_positions": self.model.learned_positions} | {
            f"model.blocks.{name}.mixer.max_len": getattr(block.mixer, "max_len", None)
            for name, block in self.model.blocks.items()
        }
        for key, longest in limits.items():
            if longest is not None and longest < self.corpus.seq_len:
                raise ValueError(
                    f"{key} {longest} is shorter than corpus.seq_len {self.corpus.seq_len}; "
                    "give it at least that"
                )

    @property
    def steps(self) -> int:
        """Optimizer steps in the budget."""
        return self.budget.tokens // self.optimizer.batch_tokens

    @property
    def batch_sequences(self) -> int:
        """Sequences a step, over all ranks."""
        return self.optimizer.batch_tokens // self.corpus.seq_len


@dataclass(frozen=True)
class ExecutionConfig:
    """How a run is executed; it may change a number only by rounding of fp32 reductions.

    Attributes:
        ranks: processes of one run.
        sequence_parallel: consecutive ranks that hold the parts of the same sequences, a divisor
            of `ranks`; 1 for whole sequences on every rank.
        threads: CPU threads of each process, fixed for the life of a run.
        micro_batch_sequences: sequences a rank passes through the model at once; None for all.
        zero_stage: DeepSpeed's ZeRO stage.
        recompute: whether blocks are computed anew in the backward pass: less memory, a third more
            work, the same numbers.
        compile: whether `torch.compile` makes the blocks faster; the first steps take minutes.
        save_every_tokens: tokens between checkpoints; None saves at forks and the end only.
        keep_checkpoints: newest checkpoints kept beside the pinned ones.
        data_root: folder of the built datasets.
        tracker: where rows are copied to.
    """

    ranks: int = 1
    sequence_parallel: int = 1
    threads: int = 1
    micro_batch_sequences: int | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0
    recompute: bool = False
    compile: bool = False
    save_every_tokens: int | None = None
    keep_checkpoints: int = 2
    data_root: str = "data"
    tracker: Literal["off", "wandb"] = "off"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        _require_positive(self, "ranks", "sequence_parallel", "threads", "keep_checkpoints")
        if self.ranks % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide ranks {self.ranks}; "
                "choose a divisor of the ranks, or a multiple of it as their number"
            )
        for name in ("micro_batch_sequences", "save_every_tokens"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if self.zero_stage == 3 and self.ranks > 1:
            raise ValueError(
                f"zero_stage is 3 on {self.ranks} ranks, but the head reads the embedding where "
                "DeepSpeed does not gather it; choose zero_stage 2"
            )
        if self.compile and (self.zero_stage == 3 or self.sequence_parallel > 1):
            raise ValueError(
                "compile is on, but ZeRO-3 and sequence_parallel exchange tensors inside blocks, "
                "which compiled blocks do not; set compile to false, or zero_stage below 3 and "
                "sequence_parallel to 1"
            )

    @property
    def data_ranks(self) -> int:
        """Shares of a global batch: ranks that do not hold parts of the same sequences."""
        return self.ranks // self.sequence_parallel


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a checkpoint; hashed into the evaluation id, never into the run id.

    Attributes:
        milestones: token counts at which every run is evaluated, beside its end.
        blocks_per_set: validation blocks read of each set.
        batch_sequences: sequences evaluated at once.
        mask_rate: share of the tokens that an objective with masks hides here, whatever it hid in
            training.
    """

    milestones: tuple[int, ...] = ()
    blocks_per_set: int = 64
    batch_sequences: int = 16
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        _require_positive(self, "blocks_per_set", "batch_sequences")
        _require_within(self, 0, 1, "mask_rate")


def sequences_at_once(run: RunConfig, execution: ExecutionConfig) -> int:
    """Sequences that pass through the model together on one rank.

    Raises:
        ValueError: the run cannot be laid out over these ranks.
    """
    _check_shards(run, execution)
    if run.batch_sequences % execution.data_ranks:
        raise ValueError(
            f"execution.ranks {execution.ranks} / execution.sequence_parallel "
            f"{execution.sequence_parallel} does not divide the {run.batch_sequences} sequences "
            "of a step; choose a divisor or other optimizer.batch_tokens"
        )
    mine = run.batch_sequences // execution.data_ranks
    micro = execution.micro_batch_sequences or mine
    if mine % micro:
        raise ValueError(
            f"execution.micro_batch_sequences {micro} does not divide the {mine} sequences "
            "of a rank; choose a divisor"
        )
    return micro


def _check_shards(run: RunConfig, execution: ExecutionConfig) -> None:
    shards = execution.sequence_parallel
    if shards > run.corpus.seq_len:
        raise ValueError(
            f"execution.sequence_parallel {shards} is more than the {run.corpus.seq_len} tokens of "
            "corpus.seq_len; choose at most that many"
        )
    if shards > 1 and run.model.encoder is not None:
        raise ValueError(
            f"execution.sequence_parallel is {shards}, but objective {run.objective} reads a "
            "source, which cannot be cut over ranks; set it to 1"
        )


def _describe(form: str, encoder: bool) -> str:
    return f"a {form} with an encoder" if encoder else f"a lone {form}"


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} {getattr(config, name)} is not above 0; take a larger one")


def _require_within(config: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ValueError(
                f"{name} {getattr(config, name)} is outside {low} to {high}; choose within"
            )
