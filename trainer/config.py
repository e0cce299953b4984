"""The config classes of a run, and the checks that a config must pass.

`RunConfig` is what is trained, and is hashed into the run id. `ExecutionConfig` is how, and changes
results only by rounding. `EvaluationConfig` is what is measured of a checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipelines.config import DataConfig
from data_pipelines.tokenizers import vocabulary_size
from models.backbone import BackboneConfig
from trainer.field_checks import (
    require_default,
    require_names,
    require_positive,
    require_within,
)
from trainer.recipe import OptimizerConfig, ScheduleConfig

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class BudgetConfig:
    """How long a run trains."""

    tokens: int
    """Training tokens, the run's horizon; a whole number of batches."""

    def __post_init__(self) -> None:
        require_positive(self, "tokens")


Objective = Literal["causal_lm", "masked_lm", "seq2seq"]
FORMS: Mapping[str, tuple[str, bool]] = {
    "causal_lm": ("decoder", False),
    "masked_lm": ("encoder", False),
    "seq2seq": ("decoder", True),
}
"""The form of backbone that each objective needs, and whether it reads a source."""


@dataclass(frozen=True)
class RunConfig:
    """What is trained. Its hash is the run id."""

    architecture: str
    """Name of the architecture, and of its recipe where that differs; in a sweep one of
    sweeps/architectures/."""
    rung: str
    """Name of the model size, such as 31k."""
    nominal_parameters: int
    """Parameters of the rung, which budgets and learning rates are derived from; the model's own
    may differ by 1 %."""
    model: BackboneConfig
    """The model: blocks, depth and width."""
    corpus: DataConfig
    """The training data: a mixture of the domains of one dataset."""
    optimizer: OptimizerConfig
    """The optimizer and its batch."""
    schedule: ScheduleConfig
    """The learning-rate schedule."""
    budget: BudgetConfig
    """How long the run trains."""
    precision: Literal["fp32", "bf16"]
    """fp32, or bf16 for bf16 matrix products over fp32 weights. In a sweep and in a run's YAML,
    auto takes bf16 on a GPU and fp32 on a CPU."""
    seed: int
    """Seed of the initial weights and of what masked objectives hide."""
    objective: Objective = "causal_lm"
    """What is predicted: the next token; masked tokens, by an encoder; or a masked span, by a
    decoder that attends to an encoder of the rest. The last two mask with the vocabulary's last
    id."""
    mask_rate: float = 0.3
    """Share of the tokens, up to 1, that a masked objective hides in training, at least one of a
    sequence; causal_lm ignores it. 0.3 as in M2-BERT (Fu et al. 2023)."""

    z_loss: float = 0.0
    """Weight of log^2 Z beside the cross-entropy in what is minimised, 0 or more, where Z is the
    softmax's denominator; 1e-4 in PaLM (Chowdhery et al. 2022, section 5). The losses in records
    and evaluations are without it."""

    def __post_init__(self) -> None:
        require_names(self, "architecture", "rung")
        require_within(self, 0, math.inf, "z_loss")
        require_positive(self, "nominal_parameters")
        require_within(self, 0, LARGEST_SEED, "seed")
        require_within(self, 0, 1, "mask_rate")
        if self.objective == "causal_lm":
            require_default(self, "mask_rate", because="objective causal_lm hides nothing")
        if self.model.mup is not None and self.optimizer.kind == "muon":
            raise ValueError(
                "model.mup is given, but optimizer.kind is muon, whose updates are not AdamW's and "
                "need other multipliers; take adamw or lion, or remove model.mup"
            )
        self._check_form()
        self._check_vocabulary()
        check_hiding(self, self.mask_rate, "mask_rate")
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
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Whether the learning rate reaches its peak before it falls, and falls where it should."""
        if self.schedule.kind != "wsd":
            self._check_fall()
            return
        decay = round(self.schedule.decay_fraction * self.steps)
        constant = (self.steps - decay) * self.optimizer.batch_tokens
        if decay == self.steps:
            raise ValueError(
                f"schedule.decay_fraction {self.schedule.decay_fraction} decays from the first of "
                f"the run's {self.steps} steps; choose a smaller one, such as 0.2"
            )
        if self.schedule.warmup_tokens > constant:
            raise ValueError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} is more than the {constant} "
                f"tokens before the decay, so the learning rate never reaches its peak; lower it "
                f"to at most that, or raise budget.tokens {self.budget.tokens}"
            )

    def _check_fall(self) -> None:
        most = (self.steps - 1) * self.optimizer.batch_tokens
        if self.schedule.warmup_tokens > most:
            raise ValueError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} leaves no step of the run's "
                f"{self.steps} over which schedule.kind {self.schedule.kind} could decay; lower it "
                f"to at most {most}, or raise budget.tokens {self.budget.tokens}"
            )

    def _check_form(self) -> None:
        wanted = FORMS[self.objective]
        has = (self.model.form, self.model.encoder is not None)
        if has != wanted:
            raise ValueError(
                f"objective {self.objective} is for {_describe(*wanted)} models, but the model is "
                f"{_describe(*has)}; change the objective, or model.form and model.encoder"
            )

    def _check_vocabulary(self) -> None:
        ids = vocabulary_size(self.corpus.tokenizer)
        special = int(self.objective != "causal_lm")
        if self.model.vocab_size < ids + special:
            mask = f" and 1 for the mask of {self.objective}" if special else ""
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, but corpus.tokenizer has {ids} ids, "
                f"its own special ones included{mask}; set it to {ids + special}"
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
                    "raise it to at least that"
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
    """How a run is executed; it changes results only by the rounding of fp32 reductions."""

    ranks: int = 1
    """Processes of one run, 1 or more."""
    sequence_parallel: int = 1
    """Consecutive ranks that share each sequence, cut along its length; a divisor of ranks. 1 for
    whole sequences on every rank."""
    threads: int = 1
    """CPU threads per process, 1 or more; another number changes the rounding of sums."""
    micro_batch_sequences: int | None = None
    """Sequences that a rank passes through the model at once; the rest of its batch is accumulated.
    null for all at once."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage (Rajbhandari et al. 2020): 1 shards optimizer states, 2 gradients too;
    3 shards weights too and needs ranks 1 here."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass, for less memory, about a
    third more work and the same numbers."""
    compile: bool = False
    """Compile the blocks with torch.compile; the first steps take minutes."""
    save_every_tokens: int | None = None
    """Training tokens between checkpoints; null saves at forks and at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, 1 or more, beside those that other runs branch from. 2, so that a
    damaged newest one leaves another."""
    data_root: str = "data"
    """Folder of the built datasets."""
    tracker: Literal["off", "wandb"] = "off"
    """Where metrics are copied to, beside the run's own record."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        require_positive(self, "ranks", "sequence_parallel", "threads", "keep_checkpoints")
        require_names(self, "data_root")
        if self.ranks % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide ranks {self.ranks}; "
                "choose a divisor of ranks, or change ranks to a multiple of it"
            )
        for name in ("micro_batch_sequences", "save_every_tokens"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        if self.zero_stage == 3 and self.ranks > 1:
            raise ValueError(
                f"zero_stage is 3 on {self.ranks} ranks, but the output head reads the embedding "
                "outside of its module, where DeepSpeed does not gather it; choose zero_stage 2"
            )
        if self.compile and (self.zero_stage == 3 or self.sequence_parallel > 1):
            raise ValueError(
                "compile is true, but ZeRO-3 and sequence_parallel communicate inside blocks, "
                "which compiled blocks cannot; set compile to false, or zero_stage below 3 and "
                "sequence_parallel to 1"
            )

    @property
    def data_ranks(self) -> int:
        """Shares of a global batch: ranks that do not hold parts of the same sequences."""
        return self.ranks // self.sequence_parallel


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of a checkpoint; hashed into the evaluation id, never into the run id."""

    milestones: tuple[int, ...] = ()
    """Training tokens after which every run is evaluated, beside its end."""
    blocks_per_set: int = 64
    """Validation blocks of each evaluation set that are read at milestones and at the end, spread
    evenly over the set, so that points of one curve are of the same text; 1 or more."""
    final_blocks_per_set: int | None = None
    """Validation blocks of each set that results are computed from, read at the end of a run;
    null for all there are, and no fewer than blocks_per_set."""
    final_sets: tuple[str, ...] | None = None
    """Evaluation sets that final_blocks_per_set is for; of the others, blocks_per_set blocks are
    read at a run's end too. null for all sets."""
    batch_sequences: int = 16
    """Sequences evaluated at once, 1 or more; changes speed and memory only."""
    mask_rate: float = 0.15
    """Share of the tokens, up to 1, that a masked objective hides in evaluation, whatever it hides
    in training, at least one of a sequence; 0.15 as in BERT (Devlin et al. 2019)."""

    def __post_init__(self) -> None:
        require_positive(self, "blocks_per_set", "batch_sequences")
        if self.final_blocks_per_set is not None:
            require_within(self, self.blocks_per_set, math.inf, "final_blocks_per_set")
        if any(tokens < 1 for tokens in self.milestones):
            raise ValueError(
                f"milestones {list(self.milestones)} are not all above 0; choose token counts"
            )
        require_within(self, 0, 1, "mask_rate")

    def final_blocks(self, evaluation_set: str) -> int | None:
        """Blocks of a set that are read at the end of a run; None for all there are."""
        whole = self.final_sets is None or evaluation_set in self.final_sets
        return self.final_blocks_per_set if whole else self.blocks_per_set


def check_hiding(run: RunConfig, rate: float, key: str) -> None:
    """Check that a masked objective hides tokens: without targets there is no loss.

    Args:
        run: the run.
        rate: share of the tokens to hide.
        key: the rate's key, for the message.

    Raises:
        ValueError: the rate hides none of a sequence's tokens.
    """
    seq_len = run.corpus.seq_len
    if run.objective != "causal_lm" and round(rate * seq_len) < 1:
        raise ValueError(
            f"{key} {rate} hides no token of a sequence of {seq_len}, so {run.objective} has "
            f"nothing to predict; take at least {1 / seq_len:.2g}"
        )


def check_layout(run: RunConfig, execution: ExecutionConfig) -> None:
    """Check that the run's optimizer and average work on weights as ZeRO shards them.

    Raises:
        ValueError: they do not.
    """
    if run.optimizer.ema_decay is not None and execution.zero_stage == 3:
        raise ValueError(
            f"optimizer.ema_decay is {run.optimizer.ema_decay}, but execution.zero_stage 3 shards "
            "the weights that are averaged; set zero_stage to 2 or below, or ema_decay to null"
        )
    if run.optimizer.kind == "muon" and execution.zero_stage > 0:
        raise ValueError(
            f"execution.zero_stage is {execution.zero_stage}, but optimizer.kind muon needs whole "
            "matrices, which ZeRO cuts over the ranks; set zero_stage to 0, or kind to adamw"
        )


def sequences_at_once(run: RunConfig, execution: ExecutionConfig) -> int:
    """Sequences that pass through the model together on one rank.

    Raises:
        ValueError: the batch or the sequences cannot be divided among the ranks.
    """
    _check_shards(run, execution)
    if run.batch_sequences % execution.data_ranks:
        raise ValueError(
            f"execution.ranks {execution.ranks} / execution.sequence_parallel "
            f"{execution.sequence_parallel} does not divide the {run.batch_sequences} sequences "
            "per step; choose a divisor, or another optimizer.batch_tokens"
        )
    pieces = run.corpus.pieces
    if run.batch_sequences % (execution.data_ranks * pieces):
        raise ValueError(
            f"optimizer.batch_tokens {run.optimizer.batch_tokens} is {run.batch_sequences} "
            f"sequences, but each rank reads whole blocks of {pieces}; choose a multiple of "
            f"{execution.data_ranks * pieces * run.corpus.seq_len} tokens"
        )
    mine = run.batch_sequences // execution.data_ranks
    micro = execution.micro_batch_sequences or mine
    if mine % micro:
        raise ValueError(
            f"execution.micro_batch_sequences {micro} does not divide the {mine} sequences "
            "per rank; choose a divisor"
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
    return f"encoder-{form}" if encoder else f"{form}-only"
