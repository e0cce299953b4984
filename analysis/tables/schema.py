"""The one table schema: every column a table of runs may have, with kind, unit and known names.

One row is one (run, checkpoint, evaluation set). All numbers are float64, losses are in nats, and
an empty cell means unknown, never zero. Several counts of parameters and of FLOPs have columns
of their own, as conclusions may depend on the choice.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """What a column means.

    Attributes:
        kind: `count` (positive), `flops` (positive), `loss` (positive), `number` (finite), `flag`
            or `text`.
        names: what other tables call it, in lower case with underscores.
    """

    kind: str
    meaning: str
    names: tuple[str, ...] = ()


SCHEMA = {
    "run_id": Column("text", "which run", ("run", "name", "run_name", "id", "model_name", "uid")),
    "trunk_id": Column("text", "cluster: rows that share training", ("group_id", "cluster")),
    "seed": Column("text", "of the initial weights", ("random_seed",)),
    "order_seed": Column("text", "of the order of samples", ("data_seed", "shuffle_seed")),
    "status": Column("text", "done, diverged, running, ...", ("state",)),
    "architecture": Column("text", "name of the arm", ("arch", "model_type", "mixer", "family")),
    "rung": Column("text", "named size", ()),
    "hybrid_ratio": Column("number", "share of attention layers", ("attention_ratio",)),
    "n_layers": Column("count", "layers", ("n_layer", "num_layers", "depth", "layers")),
    "d_model": Column("count", "width", ("width", "hidden_size", "n_embd")),
    "head_dim": Column("count", "channels per head", ("head_size",)),
    "d_state": Column("count", "state size per channel", ("state_dim", "state_size", "ssm_state")),
    "block_size": Column("count", "block of a structured matrix", ("monarch_block",)),
    "context_length": Column(
        "count", "training context [tokens]", ("context_len", "seq_len", "ctx", "context")
    ),
    "parameters": Column(
        "count",
        "N: total parameters, tied embeddings once [parameters]",
        ("n", "size", "params", "n_params", "num_params", "n_total", "total_params", "model_size",
         "parameter_count", "total_parameters", "n_parameters"),
    ),
    "non_embedding_parameters": Column(
        "count", "N without embeddings [parameters]",
        ("n_nonemb", "n_non_embedding", "non_embedding_params", "params_no_embed", "nonemb_params"),
    ),
    "active_parameters": Column(
        "count", "N used per token [parameters]", ("n_active", "active_params")
    ),
    "vocab_size": Column("count", "ids [tokens]", ("vocab", "vocabulary_size", "v")),
    "tokenizer": Column("text", "which tokenizer", ()),
    "corpus": Column(
        "text", "name of the training mixture",
        ("dataset", "pretraining_data", "train_set", "data", "training_data", "train_dataset"),
    ),
    "dataset_root_hash": Column("text", "fingerprint of the data", ("dataset_version_hash",)),
    "unique_tokens": Column("count", "U: distinct training tokens [tokens]", ("u", "u_tokens")),
    "tokens": Column(
        "count", "D: training tokens seen at this point [tokens]",
        ("d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "d_tokens",
         "tokens_seen"),
    ),
    "epochs": Column("number", "passes over the data", ("n_epochs", "num_epochs")),
    "batch_tokens": Column("count", "tokens in one step [tokens]", ("tokens_per_batch",)),
    "learning_rate": Column("number", "peak learning rate", ("lr", "lr_peak", "max_lr", "peak_lr")),
    "learning_rate_tuned": Column("flag", "rate searched for this arm", ("lr_tuned", "tuned")),
    "learning_rate_sweep": Column("text", "which search chose it", ("lr_sweep_id",)),
    "schedule": Column("text", "shape of the learning rate", ("lr_schedule", "scheduler")),
    "warmup_tokens": Column("count", "linear warm-up [tokens]", ()),
    "horizon_steps": Column("count", "step at which the schedule ends [steps]", ("max_steps",)),
    "horizon_tokens": Column("count", "the schedule's length [tokens]", ("max_tokens",)),
    "step": Column("number", "optimizer steps taken [steps]", ("steps", "iteration", "iter")),
    "decayed": Column(
        "flag", "whether the rate had decayed to its end",
        ("schedule_finished", "cooled", "cooldown"),
    ),
    "optimizer": Column("text", "which optimizer", ()),
    "weight_decay": Column("number", "weight decay", ("wd",)),
    "beta2": Column("number", "second-moment decay", ("adam_beta2",)),
    "precision": Column("text", "dtype of products", ("dtype",)),
    "flops": Column(
        "flops", "C: exact training FLOPs [FLOP]",
        ("c", "training_flops", "train_flops", "flops_exact", "compute", "total_flops", "flop",
         "training_compute", "training_flop"),
    ),
    "flops_six_nd": Column("flops", "6 x total parameters x tokens [FLOP]", ("flops_6nd",)),
    "flops_six_n": Column("flops", "6 x non-embedding parameters x tokens [FLOP]", ("flops_6n",)),
    "flops_full_attention": Column("flops", "C with full-square attention [FLOP]", ()),
    "flops_attention": Column("flops", "attention's part of C [FLOP]", ()),
    "wall_seconds": Column("count", "training time [s]", ("wall_s", "wall_time", "train_time")),
    "tokens_per_second": Column("count", "speed [tokens/s]", ("throughput", "tok_s")),
    "device": Column("text", "accelerator", ("gpu", "hardware")),
    "devices": Column("count", "accelerators", ("n_devices", "n_gpus", "num_gpus")),
    "peak_bytes": Column("count", "largest memory [bytes]", ("peak_mem", "peak_memory")),
    "evaluation_set": Column(
        "text", "name of the held-out set", ("eval_set", "validation_set", "eval_dataset", "split")
    ),
    "loss_nats": Column(
        "loss", "loss [nats per token]",
        ("loss", "l", "val_loss", "validation_loss", "eval_loss", "test_loss", "nll",
         "cross_entropy", "final_loss"),
    ),
    "loss_se": Column("number", "standard error of the loss [nats]", ("loss_std_err",)),
    "bits_per_byte": Column("loss", "loss [bits per byte]", ("bpb",)),
    "targets": Column("count", "predicted tokens in the set [tokens]", ("eval_tokens",)),
    "utf8_bytes": Column("count", "size of the set's text [bytes]", ("eval_bytes",)),
    "commit": Column("text", "code version", ("code_commit", "git_sha", "revision")),
    "config_hash": Column("text", "hash of the configuration", ()),
    "started": Column("text", "when the run began", ("start_time", "date")),
    "data_licence": Column("text", "licence of the data", ("licence_of_data", "license")),
}  # fmt: skip

SCALES = {
    "": 1.0, "k": 1e3, "thousand": 1e3, "m": 1e6, "mn": 1e6, "million": 1e6, "millions": 1e6,
    "b": 1e9, "bn": 1e9, "g": 1e9, "billion": 1e9, "billions": 1e9, "t": 1e12, "tn": 1e12,
    "trillion": 1e12, "trillions": 1e12, "pflop": 1e15, "pflops": 1e15, "eflop": 1e18,
    "eflops": 1e18, "zflop": 1e21, "zflops": 1e21, "pf_days": 8.64e19, "pflop_s_days": 8.64e19,
}  # fmt: skip
"""Units of counts and FLOPs, as names and cells carry them."""

LOSS_UNITS = {
    "nats": "nats", "nat": "nats", "bits": "bits", "bit": "bits", "log2": "bits", "bpb": "bpb",
    "bits_per_byte": "bpb", "ppl": "ppl", "perplexity": "ppl", "ln": "nats",
    "nats_per_token": "nats", "bits_per_token": "bits",
}  # fmt: skip

_COUNT_UNIT = "|".join(sorted((unit for unit in SCALES if len(unit) > 0), key=len, reverse=True))


def plain(name: str) -> str:
    """A column's name in lower case, anything but letters and digits as one underscore."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def split_unit(name: str, kind: str) -> tuple[str, str]:
    """A column's plain name without its unit, and the unit: `Tokens (B)` is tokens in b."""
    bracketed = re.fullmatch(r"(.*?)[\[(]([^\])]*)[\])]\s*", name)
    if bracketed:
        return plain(bracketed[1]), plain(bracketed[2])
    bare = plain(name)
    units = _COUNT_UNIT if kind in ("count", "flops") else "|".join(LOSS_UNITS)
    suffixed = re.fullmatch(rf"(.+)_({units})", bare)
    return (suffixed[1], suffixed[2]) if suffixed else (bare, "")


def target_of(name: str) -> tuple[str, str] | None:
    """The schema's column that a name stands for, with the unit in the name; None if unknown."""
    bare = plain(name)
    if bare in _BY_NAME:
        return _BY_NAME[bare], ""
    for kind in ("count", "loss"):
        stem, unit = split_unit(name, kind)
        if stem in _BY_NAME and SCHEMA[_BY_NAME[stem]].kind in _UNITS_OF[kind]:
            return _BY_NAME[stem], unit
    return None


_UNITS_OF = {"count": ("count", "flops"), "loss": ("loss", "number")}
_BY_NAME = {other: name for name, column in SCHEMA.items() for other in (name, *column.names)}
