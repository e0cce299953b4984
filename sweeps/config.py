"""The config classes of a sweep file: ladders, corpora, architectures, and the launcher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from data_pipelines.config import DatasetConfig
from models.backbone import BackboneConfig
from trainer.config import EvaluationConfig, ExecutionConfig, Objective
from trainer.field_checks import require_names, require_positive, require_within
from trainer.recipe import OptimizerConfig, ScheduleConfig
from untrusted.paths import plain_name

MOST_ORDER = 16


@dataclass(frozen=True)
class LauncherConfig:
    """Where runs are executed; it is not part of a run's configuration."""

    cluster: Literal["local", "slurm", "inline"] = "local"
    """local for processes on this machine, slurm for SLURM jobs, inline for the launcher's own
    process."""
    slots: int | None = None
    """CPU threads that local runs may use together; null for all that this process may use."""
    partition: str | None = None
    """SLURM's --partition; null for the cluster's default."""
    account: str | None = None
    """SLURM's --account; null for the user's default."""
    minutes: int = 240
    """Time limit of a SLURM job, in minutes (SLURM's --time); longer runs are requeued and resume.
    Local runs have none."""
    memory_gb: int | None = None
    """Memory per node in GB (SLURM's --mem); null for the cluster's default."""
    gpus_per_node: int = 0
    """GPUs per node (SLURM's --gpus-per-node)."""
    ranks_per_node: int | None = None
    """Ranks per node on SLURM, a divisor of a run's ranks; null for one per GPU, or without GPUs
    for all ranks of a run on one node."""
    runs_per_job: int = 8
    """Single-rank runs that one SLURM job trains one after the other, so that small runs do not
    wait in the queue one by one."""

    def __post_init__(self) -> None:
        require_positive(self, "minutes", "runs_per_job")
        require_within(self, 0, math.inf, "gpus_per_node")
        for name in ("slots", "memory_gb", "ranks_per_node"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        for name in ("partition", "account"):
            if getattr(self, name) is not None:
                require_names(self, name)


@dataclass(frozen=True)
class PowerRule:
    """coefficient * (N / 1e6) ** exponent of a rung's nominal parameters N."""

    coefficient: float
    """The rule's value at 1 M parameters."""
    exponent: float
    """Power of the size, -10 to 10; below 0 the value falls with size."""
    source: str = ""
    """Where the rule comes from, for the plan."""

    def __post_init__(self) -> None:
        require_positive(self, "coefficient")
        require_within(self, -10, 10, "exponent")

    def at(self, parameters: int) -> float:
        """The rule's value."""
        return self.coefficient * (parameters / 1e6) ** self.exponent


@dataclass(frozen=True)
class ExtraSeeds:
    """Additional seeds at some rungs, which measure the seed noise."""

    rungs: tuple[str, ...]
    """Sizes that are trained with these seeds too."""
    seeds: tuple[int, ...]
    """The additional seeds."""
    order_seeds: tuple[int, ...] | None = None
    """Seeds of the order of samples to cross them with; null for each seed's own order."""

    def __post_init__(self) -> None:
        require_distinct(self, "rungs", "seeds")


@dataclass(frozen=True)
class TuningProbes:
    """Runs that check a study's own learning rates and batch, on its first corpus and seed.

    They train to the longest horizon, and the report compares each with the study's own run.
    """

    rungs: tuple[str, ...] = ("smallest", "middle")
    """Sizes at which every architecture is probed: rungs of the ladder by name, or smallest,
    middle (the lower of two) or largest of them."""
    learning_rate_factors: tuple[float, ...] = (0.5, 2.0)
    """Factors on the learning rate, each a run of its own at the study's batch."""
    batch_factors: tuple[float, ...] = (0.5, 2.0)
    """Factors on the batch, each a run of its own; the learning rate follows the architecture's
    rule where that knows the batch, and stays otherwise."""

    def __post_init__(self) -> None:
        require_distinct(self, "rungs")
        if not self.learning_rate_factors and not self.batch_factors:
            raise ValueError(
                "learning_rate_factors and batch_factors are both empty; give factors, or "
                "tuning_probes=null"
            )
        for name in ("learning_rate_factors", "batch_factors"):
            require_factors(self, name)
            if 1.0 in getattr(self, name):
                raise ValueError(f"{name} has 1, which is the study's own run; remove it")

    def rungs_of(self, ladder: Sequence[str]) -> list[str]:
        """The rungs to probe, of a ladder's rungs from the smallest to the largest."""
        places = {"smallest": 0, "middle": (len(ladder) - 1) // 2, "largest": -1}
        named = [ladder[places[rung]] if rung in places else rung for rung in self.rungs]
        return list(dict.fromkeys(named))


@dataclass(frozen=True)
class LadderConfig:
    """Sizes, horizons and the rules that all architectures and corpora share."""

    rungs: tuple[str, ...]
    """Model sizes, by name: 10k to 3B (launch/ladder.py lists them)."""
    seq_len: int
    """Tokens of a training sequence."""
    batch_tokens: int
    """Tokens per optimizer step, the same at all sizes."""
    warmup_tokens: int
    """Tokens of linear warm-up, the same at all sizes."""
    learning_rate: PowerRule | None = None
    """Peak learning rate as a power of the size, the same for all architectures; null for each
    architecture's own rule (the key tuning of its file)."""
    seeds: tuple[int, ...] = (17,)
    """Seeds that every run is trained with: of its initial weights, of what is masked, and, unless
    order_seeds is given, of the order of its training samples."""
    order_seeds: tuple[int, ...] | None = None
    """Seeds of the order of samples, each crossed with each of seeds; null for each seed's own
    order."""
    horizons: tuple[int, ...] = ()
    """Token budgets, rounded to whole batches; runs that differ in these alone share a trunk.
    Either these or tokens_per_parameter."""
    tokens_per_parameter: tuple[float, ...] = ()
    """Token budgets as multiples of a rung's nominal parameters; 20 is about Chinchilla's optimum
    (Hoffmann et al. 2022)."""
    replicates: ExtraSeeds | None = None
    """Additional seeds at some rungs; null for none."""
    more_corpora: tuple[str, ...] = ()
    """Mixtures to train on beside the corpora's default ones."""
    learning_rate_factors: tuple[float, ...] = (1.0,)
    """Factors on the rule's learning rate, each a run of its own; several make the sweep a search
    over learning rates."""
    batch_factors: tuple[float, ...] = (1.0,)
    """Factors on batch_tokens, each a run of its own."""
    tuning_probes: TuningProbes | None = None
    """Runs that check the study's own learning rates and batch; null for none."""
    epoch_blocks: int | None = None
    """Blocks per epoch, for horizons that would repeat the corpora's own; null for those."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto takes bf16 on a GPU and fp32 on a CPU."""
    model: Annotated[dict, BackboneConfig] = field(default_factory=dict)
    """Keys that replace the architectures' own, as the sweep's model does; that one wins."""
    execution: Annotated[dict, ExecutionConfig] = field(default_factory=dict)
    """How runs of this ladder are executed; the sweep's execution wins."""
    evaluation: Annotated[dict, EvaluationConfig] = field(default_factory=dict)
    """What is measured of this ladder's runs; the sweep's evaluation wins."""

    def __post_init__(self) -> None:
        if bool(self.horizons) == bool(self.tokens_per_parameter):
            raise ValueError("horizons and tokens_per_parameter: give exactly one of the two")
        require_positive(self, "seq_len", "batch_tokens")
        require_within(self, 0, math.inf, "warmup_tokens")
        if self.epoch_blocks is not None:
            require_positive(self, "epoch_blocks")
        require_distinct(self, "rungs", "seeds", "learning_rate_factors", "batch_factors")
        require_distinct(self, *(("horizons",) if self.horizons else ("tokens_per_parameter",)))
        for name in (
            "horizons",
            "tokens_per_parameter",
            "learning_rate_factors",
            "batch_factors",
        ):
            require_factors(self, name)
        self._check_probes()

    def _check_probes(self) -> None:
        if self.tuning_probes is None:
            return
        chosen = self.tuning_probes.rungs_of(self.rungs)
        unknown = [rung for rung in chosen if rung not in self.rungs]
        if unknown:
            raise ValueError(
                f"tuning_probes.rungs has {unknown[0]!r}, which the ladder does not train; choose "
                f"among {list(self.rungs)}"
            )
        if len(self.learning_rate_factors) > 1 or len(self.batch_factors) > 1:
            raise ValueError(
                "tuning_probes are for a study, but several learning_rate_factors or "
                "batch_factors make the sweep a search; remove one of them"
            )


@dataclass(frozen=True)
class MixtureConfig:
    """One corpus: shares of domains, and how many bytes of them are unique."""

    domains: dict[str, float]
    """Share of each domain; the shares sum to 1."""
    unique_bytes: int | None = None
    """UTF-8 bytes of distinct training text, after which it repeats; null for all there is."""


@dataclass(frozen=True)
class CorporaConfig:
    """A dataset and the corpora mixed from its domains."""

    dataset: DatasetConfig
    """The dataset, built at the first run of the sweep."""
    mixtures: dict[str, MixtureConfig]
    """Corpora, by name."""
    default: tuple[str, ...]
    """Mixtures that every ladder trains on."""
    neutral_set: str
    """Domain with the same share in all mixtures, whose validation loss the headline compares."""
    epoch_blocks: int
    """Blocks per epoch, after which they are shuffled anew; the same for the whole study."""

    def __post_init__(self) -> None:
        require_distinct(self, "default")
        require_positive(self, "epoch_blocks")


@dataclass(frozen=True)
class RecipeConfig:
    """How an arm of a sweep is trained, where that differs from the rest of the sweep."""

    optimizer: Annotated[dict, OptimizerConfig] = field(default_factory=dict)
    """Keys of the optimizer, over those of the sweep; not learning_rate or batch_tokens."""
    schedule: Annotated[dict, ScheduleConfig] = field(default_factory=dict)
    """Keys of the learning-rate schedule, over those of the sweep."""
    z_loss: float | None = None
    """Weight of the z-loss; null for that of the sweep."""
    learning_rate_factor: float = 1.0
    """Factor on the learning rate that the sweep gives, above 0."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate_factor")
        for key in ("learning_rate", "batch_tokens"):
            if key in self.optimizer:
                raise ValueError(
                    f"optimizer.{key} is {self.optimizer[key]}, but the sweep gives it, the same "
                    "to all recipes; remove it, or give a learning_rate_factor"
                )


@dataclass(frozen=True)
class SweepConfig:
    """A sweep file. `ladder` and `corpus` choose among `ladders` and `corpora`."""

    name: str
    """Name of its folder below runs/; a ladder other than default is appended to it."""
    ladder: str
    """Which of the ladders to train."""
    corpus: str
    """Which of the corpora to train on."""
    architectures: tuple[str, ...]
    """Architectures to train, by the names of sweeps/architectures/."""
    ladders: dict[str, LadderConfig]
    """Ladders of model sizes, by name."""
    corpora: dict[str, CorporaConfig]
    """Datasets and their mixtures, by name."""
    objective: Objective = "causal_lm"
    """What is predicted; it decides whether models are decoders, encoders or both."""
    mask_rate: float = 0.3
    """Share of the tokens, 0 to 1, that a masked objective hides in training."""
    z_loss: float = 0.0
    """Weight of log^2 Z beside the cross-entropy in what is minimised, 0 or more (Chowdhery et al.
    2022)."""
    baselines: tuple[int, ...] = ()
    """Orders of n-gram models of the training bytes that the report shows as lines; 2 for a
    bigram."""
    model: Annotated[dict, BackboneConfig] = field(default_factory=dict)
    """Keys of the model that replace the architectures' own; blocks apply to the architectures that
    have a block of that name."""
    optimizer: Annotated[dict, OptimizerConfig] = field(default_factory=dict)
    """Keys of the optimizer, over those that ladder and architecture give."""
    schedule: Annotated[dict, ScheduleConfig] = field(default_factory=dict)
    """Keys of the learning-rate schedule."""
    recipes: dict[str, RecipeConfig] = field(default_factory=dict)
    """Training recipes, by name: each is an arm of its own for every architecture, such as
    "transformer muon". An empty one is the sweep's own, under the architecture's name alone."""
    execution: Annotated[dict, ExecutionConfig] = field(default_factory=dict)
    """How runs are executed."""
    evaluation: Annotated[dict, EvaluationConfig] = field(default_factory=dict)
    """What is measured of every run."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    """Where runs are executed."""
    also: tuple[dict, ...] = ()
    """More runs: each entry sets some of architecture, recipe, corpus, rung, seed,
    learning_rate_factor, batch_factor, horizon (a token budget), label (a name for a repeat of a
    run) and execution; the rest is the ladder's. A list of values makes a run of each."""
    exclude: tuple[dict, ...] = ()
    """Runs to leave out: those that match all values of an entry."""

    def __post_init__(self) -> None:
        plain_name("name", self.name)
        plain_name("ladder", self.ladder)
        require_distinct(self, "architectures")
        for name, recipe in self.recipes.items():
            if recipe.learning_rate_factor != 1 and "learning_rate" in self.optimizer:
                raise ValueError(
                    f"recipes.{name}.learning_rate_factor is {recipe.learning_rate_factor}, but "
                    "optimizer.learning_rate fixes the rate of all runs; remove one of them"
                )
        for order in self.baselines:
            if not 1 <= order <= MOST_ORDER:
                raise ValueError(
                    f"baselines {list(self.baselines)}: the order {order} of an n-gram model is "
                    f"outside 1 to {MOST_ORDER}; choose within it"
                )


def require_factors(config: object, name: str) -> None:
    """Check that a list's values are positive numbers within reason.

    Raises:
        ValueError: one is not.
    """
    for value in getattr(config, name):
        if not 0 < value < 1e18:
            raise ValueError(f"{name} {value} is outside 0 to 1e18; choose within it")


def require_distinct(config: object, *names: str) -> None:
    """Check that lists have entries, each once.

    Raises:
        ValueError: one is empty, or names something twice.
    """
    for name in names:
        values = getattr(config, name)
        twice = [value for value in values if values.count(value) > 1]
        if twice or not values:
            problem = f"names {twice[0]!r} twice" if twice else "is empty"
            raise ValueError(f"{name} {list(values)} {problem}; give each value once")
