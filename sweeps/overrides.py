"""Overrides that would change nothing: each is refused, beside the key that decides instead."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sweeps.config import SweepConfig
from trainer.schema import ConfigError

LOCAL_KEYS = ("slots",)
SLURM_KEYS = ("partition", "account", "minutes", "memory_gb", "ranks_per_node", "runs_per_job")
OUTRANKED = {
    "learning_rate": "optimizer.learning_rate",
    "learning_rate_factors": "optimizer.learning_rate",
    "batch_tokens": "optimizer.batch_tokens",
    "batch_factors": "optimizer.batch_tokens",
    "warmup_tokens": "schedule.warmup_tokens",
}
"""Keys of a ladder, and the keys of the sweep that replace them."""
SECTIONS = ("model", "execution", "evaluation")
"""Sections that a ladder and the sweep itself both have; the sweep's wins."""


def refuse_unused(config: SweepConfig, over: Mapping[str, Any], corpora: Sequence[str]) -> None:
    """Check that every override has a part in the sweep.

    Args:
        config: the sweep with its overrides.
        over: what the command line gave.
        corpora: names of the mixtures that runs are trained on.

    Raises:
        ConfigError: names the first override that changes nothing.
    """
    refuse_unused_launcher(over.get("launcher") or {}, config.launcher.cluster)
    ladder = (over.get("ladders") or {}).get(config.ladder) or {}
    chosen = (over.get("corpora") or {}).get(config.corpus) or {}
    for reason in (
        *_not_chosen(config, over),
        *_outranked(config, ladder),
        *_untrained(config, chosen, corpora),
    ):
        raise ConfigError(f"{reason}; as given it would change nothing")


def refuse_unused_launcher(launcher: Mapping[str, Any], cluster: str) -> None:
    """Check that overrides of the launcher belong to where the runs are executed.

    Raises:
        ConfigError: names the first that does not.
    """
    for key, wanted in _launcher_keys(cluster):
        if key in launcher:
            raise ConfigError(
                f"launcher.{key} is for launcher.cluster={wanted}, but launcher.cluster is "
                f"{cluster}; add launcher.cluster={wanted} or remove it; as given it would change "
                "nothing"
            )


def _launcher_keys(cluster: str) -> Iterator[tuple[str, str]]:
    if cluster != "slurm":
        yield from ((key, "slurm") for key in SLURM_KEYS)
    if cluster != "local":
        yield from ((key, "local") for key in LOCAL_KEYS)


def _not_chosen(config: SweepConfig, over: Mapping[str, Any]) -> Iterator[str]:
    """Ladders and corpora that the sweep does not use."""
    for choice, family in (("ladder", "ladders"), ("corpus", "corpora")):
        for name in over.get(family) or {}:
            if name != getattr(config, choice):
                yield f"{family}.{name} is not the chosen {choice}; add {choice}={name}"


def _outranked(config: SweepConfig, ladder: Mapping[str, Any]) -> Iterator[str]:
    """Keys of the ladder that the sweep's own replace."""
    where = f"ladders.{config.ladder}"
    for key, winner in OUTRANKED.items():
        section, name = winner.split(".")
        if key in ladder and name in getattr(config, section):
            yield f"{where}.{key} gives way to {winner}, which the sweep sets; override that one"
    for section in SECTIONS:
        for path in _common(ladder.get(section) or {}, getattr(config, section)):
            key = f"{section}.{path}"
            yield f"{where}.{key} gives way to {key}, which the sweep sets; override that one"
    for name, factors in _varied(config).items():
        if name in config.optimizer and factors:
            yield f"optimizer.{name} leaves no place for {factors}; give one of them"


def _untrained(
    config: SweepConfig, chosen: Mapping[str, Any], corpora: Sequence[str]
) -> Iterator[str]:
    """Keys of the corpora that no run reads."""
    for name in chosen.get("mixtures") or {}:
        if name not in corpora:
            yield f"corpora.{config.corpus}.mixtures.{name} is not trained on; add it to default"
    if "epoch_blocks" in chosen and config.ladders[config.ladder].epoch_blocks is not None:
        yield (
            f"corpora.{config.corpus}.epoch_blocks gives way to "
            f"ladders.{config.ladder}.epoch_blocks; override that one"
        )


def _varied(config: SweepConfig) -> Mapping[str, str]:
    """The key by which the ladder varies the learning rate, and the batch; empty for none."""
    ladder = config.ladders[config.ladder]
    probes = ladder.tuning_probes
    rates = "learning_rate_factors" if len(ladder.learning_rate_factors) > 1 else ""
    batches = "batch_factors" if len(ladder.batch_factors) > 1 else ""
    if probes is not None:
        rates = rates or ("tuning_probes" if probes.learning_rate_factors else "")
        batches = batches or ("tuning_probes" if probes.batch_factors else "")
    return {"learning_rate": rates, "batch_tokens": batches}


def _common(below: Mapping[str, Any], above: Mapping[str, Any]) -> Iterator[str]:
    """Dotted paths of leaves that both trees have."""
    for key in below:
        if key not in above:
            continue
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            yield from (f"{key}.{path}" for path in _common(below[key], above[key]))
        else:
            yield str(key)
