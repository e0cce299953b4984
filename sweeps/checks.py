"""What can be known of runs before anything is spent: `--plan` and both launchers ask it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from data_pipelines.config import DatasetConfig
from data_pipelines.installed import ORIGIN_SHARE
from data_pipelines.manifest import MANIFEST, Manifest, read_manifest
from models.accounting import account
from models.backbone import Backbone, BackboneConfig
from models.mixer import refuse_unsharded
from sweeps.config import LauncherConfig
from trainer.config import ExecutionConfig, RunConfig, check_layout, sequences_at_once
from trainer.schema import ConfigError, dump, suggest
from untrusted.paths import inside


def check_run(run: RunConfig, execution: ExecutionConfig) -> None:
    """Check that a model can be built, and its batches and weights be shared among the ranks.

    Raises:
        ValueError: it cannot; the message names the key.
    """
    check_layout(run, execution)
    sequences_at_once(run, execution)
    _check_model(run.model, run.corpus.seq_len)
    if execution.sequence_parallel > 1:
        with torch.device("meta"):
            refuse_unsharded(Backbone(run.model))


def check_machine(executions: Iterable[ExecutionConfig], launcher: LauncherConfig) -> None:
    """Check that runs fit where they are executed.

    Raises:
        ConfigError: they need more threads or another device than there is.
    """
    if launcher.cluster == "slurm":
        for execution in executions:
            nodes_of(execution.ranks, launcher)
        return
    slots = available_slots(launcher)
    for execution in executions:
        if execution.ranks > 1 and launcher.cluster == "inline":
            raise ConfigError(
                f"execution.ranks is {execution.ranks}, but launcher.cluster inline trains in one "
                "process; set ranks to 1, or launcher.cluster to local"
            )
        needed = execution.ranks * execution.threads
        if needed > slots:
            raise ConfigError(
                f"execution.ranks {execution.ranks} x execution.threads {execution.threads} need "
                f"{needed} slots, but there are {slots}; lower one or raise launcher.slots"
            )
        if execution.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "execution.device is cuda, but there is no GPU here; choose auto or cpu"
            )


def nodes_of(ranks: int, launcher: LauncherConfig) -> tuple[int, int]:
    """Nodes of a run on SLURM, and ranks on each: one rank a GPU where nodes have GPUs.

    Raises:
        ConfigError: the ranks do not fill whole nodes.
    """
    most = launcher.ranks_per_node or launcher.gpus_per_node or ranks
    if ranks <= most:
        return 1, ranks
    if ranks % most:
        key = "ranks_per_node" if launcher.ranks_per_node else "gpus_per_node"
        raise ConfigError(
            f"execution.ranks {ranks} does not fill nodes of launcher.{key} {most}; choose a "
            "divisor of the ranks, or other ranks"
        )
    return ranks // most, most


def available_slots(launcher: LauncherConfig) -> int:
    """CPU threads that local runs may hold together."""
    return launcher.slots or len(os.sched_getaffinity(0))


def check_domains(
    corpora: Mapping[str, Iterable[str]],
    evaluation_sets: Mapping[str, Iterable[str]],
    dataset: DatasetConfig,
    root: Path,
) -> None:
    """Check that a dataset has the domains that corpora name, as far as that is known.

    Args:
        corpora: the domains of each corpus, by its name.
        evaluation_sets: by the key that names them, domains whose validation losses are read.
        dataset: what the dataset is built from.
        root: folder of all datasets.

    Raises:
        ConfigError: names the domain that there is not.
    """
    known = _known_domains(dataset, root)
    if known is None:
        return
    for name, domains in corpora.items():
        for domain in domains:
            if domain not in known:
                raise ConfigError(
                    f"corpus {name} has the domain {domain!r}, which dataset {dataset.name} lacks; "
                    f"{suggest(domain, known)}"
                )
    for key, names in evaluation_sets.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{key} {name!r} is no domain of dataset {dataset.name}; {suggest(name, known)}"
                )


def _known_domains(dataset: DatasetConfig, root: Path) -> Sequence[str] | None:
    """The domains of a dataset that is built, or whose source has them by definition."""
    built = _built(dataset, root)
    if built is not None:
        return built.domains
    return sorted(ORIGIN_SHARE) if dataset.source.kind == "installed" else None


def _built(dataset: DatasetConfig, root: Path) -> Manifest | None:
    folder = inside(root, dataset.name)
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    return manifest if manifest.config == dump(dataset) else None


def _check_model(model: BackboneConfig, seq_len: int) -> None:
    """Build a model on the meta device and pass a sequence through it, once per model."""
    key = f"{model} {seq_len}"
    if key not in _checked:
        try:
            account(model, seq_len)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0][:200]
            raise ConfigError(f"the model cannot be built: {reason}; change its sizes") from error
        _checked.add(key)


_checked: set[str] = set()
