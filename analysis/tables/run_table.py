"""The run table: a sweep folder as one row per evaluated point, and what was excluded."""

from dataclasses import dataclass, field, replace

import pandas as pd

from analysis.tables.document_losses import DocumentLosses
from analysis.tables.frames import columns_of, keep
from analysis.tables.machine_use import USE_COLUMNS
from analysis.tables.probes import PROBE_COLUMNS
from analysis.tables.training_curves import training_curves

COLUMNS = {
    "run_id": "hash of the resolved run configuration; of a trunk, its trunk_id",
    "trunk_id": "the cluster: runs of one trunk share all training before their decay",
    "status": "done, diverged, trunk, running, stopped, failed, damaged or other-data",
    "architecture": "name of the model's arm",
    "corpus": "name of the training mixture",
    "rung": "named size",
    "seed": "of the initial weights and of what is masked",
    "order_seed": "of the order of the training samples",
    "nominal_parameters": "the rung's target size [parameters]",
    "parameters": "N: total parameters, tied embeddings once [parameters]",
    "non_embedding_parameters": "N without embeddings [parameters]",
    "horizon_tokens": "the run's token budget [tokens]",
    "step": "optimizer steps taken [steps]",
    "tokens": "D: training tokens seen at this point [tokens]",
    "flops": "C: training FLOPs, causal attention as needed, head included, 3x forward [FLOP]",
    "flops_full_attention": "the same with full-square attention [FLOP]",
    "flops_six_n": "6 x non-embedding parameters x tokens [FLOP]",
    "scan_flops": "elementwise FLOPs of scans, not part of C [FLOP]",
    "state_bytes": "decoding state of one sequence [bytes]",
    "evaluation_set": "name of the held-out set",
    "subset": "whether of the blocks that every milestone reads, else of all [true/false]",
    "blocks": "validation blocks that were read [blocks]",
    "documents": "documents with a target in them [documents]",
    "evaluation_id": "hash of what was measured",
    "decayed": "whether the learning rate had decayed to its end [true/false]",
    "certificate": "commutative hash of the samples consumed so far",
    "total_nats": "summed loss over the set [nats]",
    "targets": "predicted tokens in the set [tokens]",
    "utf8_bytes": "size of the set's text [bytes]",
    "loss_nats": "total_nats / targets [nats per token]",
    "bits_per_byte": "total_nats / ln 2 / utf8_bytes [bits per byte]",
    "batch_tokens": "tokens in one optimizer step [tokens]",
    "learning_rate": "peak learning rate, the architecture's own scale included",
    "tokenizer": "what made tokens of text; one trained on a dataset carries its name",
    "vocab_size": "distinct ids [ids]",
    "unique_tokens": "different training tokens, where the mixture was cut to some; else unknown, "
    "from its bytes by this set's tokens per byte [tokens]",
    "domain_repeats": "reads of each distinct block of the domain that is repeated most, over the "
    "whole run [times]",
    "dataset_root_hash": "fingerprint of the built data",
    "commit": "code version of the latest start",
}
SEEDS = ["seed", "order_seed"]
"""What a run draws from: its initial weights, and the order of its samples."""
NO_EVIDENCE = ("", "none", "no", "n/a", "na", "nothing", "unknown", "todo", "tbd", "null")
"""How people write that there is none."""
FLOP_CONVENTIONS = {
    "flops": "headline (causal attention as needed, head included)",
    "flops_full_attention": "full-square attention",
    "flops_six_n": "6 x non-embedding parameters x tokens",
}
RUN_COLUMNS = [
    "run_id", "trunk_id", "status", "architecture", "corpus", "rung", "seed", "order_seed",
    "nominal_parameters", "parameters", "batch_tokens",
    "horizon_tokens", "tokens", "learning_rate", "vocab_size", "tokens_per_second", "device",
    "flops_per_device_second", "training_seconds",
]  # fmt: skip
BASELINE_COLUMNS = ["corpus", "evaluation_set", "order", "tokens", "total_nats", "targets"]
LADDER_COLUMNS = ["architecture", "rung", "seq_len", "state_bytes"]


@dataclass(frozen=True)
class Exclusion:
    """A run, or part of one, that the fits and contrasts do not use."""

    run_id: str
    reason: str
    kind: str


@dataclass(frozen=True)
class Table:
    """A sweep as the analysis sees it.

    Attributes:
        rows: one row per evaluated point; see COLUMNS.
        runs: one row per run of the sweep as last expanded, whatever its state.
        tuning: architecture -> its `learning_rate_scale` and the `evidence` for it.
        recipes: arm -> the arm that has its architecture and the sweep's own training recipe.
        rate_factors: factors on the rung's learning rate that each cell tries, if listed.
        baselines: losses of n-gram models, one row per corpus, evaluation set and order.
        ladder: what the accountant counts, one row per architecture, rung and context.
        probes: runs at other rates or batches, beside the run that each is compared with; see
            analysis.tables.probes.
        training: recorded training losses along each run; see analysis.tables.training_curves.
        documents: run -> evaluation set -> losses of its documents at the run's end.
        folder: where the runs lie.
    """

    name: str
    neutral_set: str
    rows: pd.DataFrame
    runs: pd.DataFrame
    exclusions: tuple[Exclusion, ...]
    context: dict
    tuning: dict = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    rate_factors: tuple[float, ...] = ()
    baselines: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=pd.Index(BASELINE_COLUMNS))
    )
    ladder: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=pd.Index(LADDER_COLUMNS))
    )
    probes: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=pd.Index(PROBE_COLUMNS))
    )
    training: pd.DataFrame = field(default_factory=lambda: training_curves([], []))
    use: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=pd.Index(USE_COLUMNS)))
    documents: dict[str, dict[str, DocumentLosses]] = field(default_factory=dict)
    folder: str = ""

    def levels(self, factor: str) -> list[str]:
        """The levels of a factor, in the order in which the sweep lists its runs."""
        return [str(level) for level in self.runs[factor].dropna().unique()]


def has_evidence(tuning: dict) -> bool:
    """Whether the entry of an architecture states a search that its learning rate comes from."""
    stated = str(tuning.get("evidence") or "").strip(" .-?").lower()
    return stated not in NO_EVIDENCE


def final(table: Table) -> Table:
    """The table with nothing but the decayed points of finished runs, on whole evaluation sets."""
    decayed = table.rows["decayed"].astype(bool) & (table.rows["status"] == "done")
    # Other people's records do not say, and have one point for both uses.
    return replace(table, rows=keep(table.rows, decayed & (table.rows["subset"] != True)))  # noqa: E712


def along_training(table: Table) -> pd.DataFrame:
    """The rows on the blocks that every milestone reads, which make curves of one text."""
    return keep(table.rows, table.rows["subset"] != False)  # noqa: E712


RESULT_COLUMNS = [
    "run_id", "trunk_id", "architecture", "corpus", "rung", "seed", "order_seed", "parameters",
    "tokens", "flops", "batch_tokens", "learning_rate", "evaluation_set", "documents", "targets",
    "loss_nats", "certificate", "dataset_root_hash", "commit",
]  # fmt: skip


def results(points: Table) -> pd.DataFrame:
    """The table that a study is stored and quoted by: its decayed points on the neutral set."""
    neutral = keep(points.rows, points.rows["evaluation_set"] == points.neutral_set)
    return columns_of(neutral, RESULT_COLUMNS).reset_index(drop=True)
