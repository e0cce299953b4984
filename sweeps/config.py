"""What a sweep file may say: ladders, corpora, architectures, and where runs are executed."""

from dataclasses import dataclass, field
from typing import Literal

from data_pipelines.config import DatasetConfig
from trainer.config import Objective


@dataclass(frozen=True)
class LauncherConfig:
    """Where runs are executed; the trainer never sees it.

    Attributes:
        cluster: `local` processes, `slurm`, or `inline` in the launcher's own process.
        slots: CPU threads (or GPUs) that local runs may hold together; None for all there are.
        partition, account, minutes, memory_gb: as SLURM asks for them.
        runs_per_job: small runs that one SLURM job trains one after the other.
    """

    cluster: Literal["local", "slurm", "inline"] = "local"
    slots: int | None = None
    partition: str | None = None
    account: str | None = None
    minutes: int = 240
    memory_gb: int | None = None
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    runs_per_job: int = 8


@dataclass(frozen=True)
class PowerRule:
    """coefficient * (N / 1e6) ** exponent of a rung's nominal parameters N."""

    coefficient: float
    exponent: float

    def at(self, parameters: int) -> float:
        """The rule's value."""
        return self.coefficient * (parameters / 1e6) ** self.exponent


@dataclass(frozen=True)
class Replicates:
    """More seeds of some rungs, which show the noise floor."""

    rungs: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class LadderConfig:
    """Sizes, horizons and the rules that all arms share.

    Attributes:
        horizons: token budgets; runs of one seed that differ in these alone share a trunk.
        tokens_per_parameter: budgets as multiples of a rung's nominal parameters, instead.
        replicates: more seeds of some rungs.
        more_corpora: corpora beside the default ones.
        learning_rate_factors: factors on the rule's rate, each a run of its own: a search.
        epoch_blocks: longer epochs than the corpora's own, for horizons that would repeat blocks.
    """

    rungs: tuple[str, ...]
    seq_len: int
    batch_tokens: int
    learning_rate: PowerRule
    warmup_tokens: int
    seeds: tuple[int, ...] = (17,)
    horizons: tuple[int, ...] = ()
    tokens_per_parameter: tuple[float, ...] = ()
    replicates: Replicates | None = None
    more_corpora: tuple[str, ...] = ()
    learning_rate_factors: tuple[float, ...] = (1.0,)
    epoch_blocks: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    model: dict = field(default_factory=dict)
    execution: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.horizons) == bool(self.tokens_per_parameter):
            raise ValueError("horizons and tokens_per_parameter: give exactly one of the two")


@dataclass(frozen=True)
class MixtureConfig:
    """One corpus: shares of domains, and how many bytes of them are unique."""

    domains: dict[str, float]
    unique_bytes: int | None = None


@dataclass(frozen=True)
class CorporaConfig:
    """A dataset and the corpora mixed from its domains.

    Attributes:
        default: names of the mixtures that every ladder crosses.
        neutral_set: evaluation set of equal share in all corpora, for headlines.
        epoch_blocks: blocks after which the order starts anew; fixed for the study.
    """

    dataset: DatasetConfig
    mixtures: dict[str, MixtureConfig]
    default: tuple[str, ...]
    neutral_set: str
    epoch_blocks: int


@dataclass(frozen=True)
class SweepConfig:
    """A sweep file. `ladder` and `corpus` choose among `ladders` and `corpora`.

    Attributes:
        objective: what is predicted; the form of all backbones follows from it.
        mask_rate: share of the tokens that an objective with masks hides in training.
        baselines: orders of n-gram models of the training bytes that the report shows as lines.
    """

    name: str
    ladder: str
    corpus: str
    architectures: tuple[str, ...]
    ladders: dict[str, LadderConfig]
    corpora: dict[str, CorporaConfig]
    objective: Objective = "causal_lm"
    mask_rate: float = 0.3
    baselines: tuple[int, ...] = ()
    model: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=dict)
    execution: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    also: tuple[dict, ...] = ()
    exclude: tuple[dict, ...] = ()
