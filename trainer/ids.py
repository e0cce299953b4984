"""The hashes that name a run, its trunk and its evaluations."""

from collections.abc import Mapping
from pathlib import Path

from data_pipelines.config import DataConfig
from data_pipelines.manifest import read_manifest
from data_pipelines.tokenizers import load_tokenizer
from trainer.config import EvaluationConfig, RunConfig
from trainer.identity import LATER_KEYS, config_hash, require_same
from trainer.schedule import decay_begins
from trainer.schema import dump
from untrusted.paths import inside

ID_LENGTH = 12


def run_id(config: RunConfig) -> str:
    """The name of a run's folder: a hash of all its choices."""
    return _run_id(dump(config))


def trunk_id(config: RunConfig) -> str:
    """The id that the horizons of one trunk share: a hash of all choices but budget and decay.

    Where the learning rate falls from the start, no horizons share a trunk, and all choices count.
    """
    return _trunk_id(dump(config))


def weights_ids(config: RunConfig, stored: Mapping, step: int) -> dict[str, str | None]:
    """The ids of the weights after a step: all horizons of a trunk share those before its decay.

    Args:
        config: of the run.
        stored: the same as plain data, as its folder has it: a later schema may know more keys.
        step: optimizer steps done.
    """
    run = _run_id(stored) if step > decay_begins(config) else None
    return {"trunk": _trunk_id(stored), "run": run}


def dataset_ids(corpus: DataConfig, root: Path) -> dict[str, str]:
    """The hashes of a corpus's dataset, whose tokenizer must be the one that it was built with.

    Raises:
        IdentityError: the tokenizer was replaced.
        RuntimeError: there is no finished dataset, or its manifest was altered.
    """
    folder = inside(root, corpus.dataset)
    manifest = read_manifest(folder)
    tokenizer = {"tokenizer_fingerprint": load_tokenizer(corpus.tokenizer, folder).fingerprint}
    require_same(
        f"the tokenizer in {folder}",
        tokenizer,
        {"tokenizer_fingerprint": manifest.tokenizer_fingerprint},
        of="the dataset's manifest",
        remedy=f"restore the tokenizer, or delete {folder} and build the dataset again",
    )
    return {"dataset_root_hash": manifest.root_hash, **tokenizer}


def evaluation_id(config: EvaluationConfig) -> str:
    """The id of comparable evaluations: a hash of what is read, not of when or in which batches."""
    choices = dump(config)
    del choices["milestones"], choices["batch_sequences"]
    # A later key: without it, ids are those of the records before it.
    if choices["final_sets"] is None:
        del choices["final_sets"]
    return config_hash(choices)[:ID_LENGTH]


def _run_id(choices: Mapping) -> str:
    return config_hash(choices)[:ID_LENGTH]


def _trunk_id(choices: Mapping) -> str:
    shared = dict(choices)
    if choices["schedule"].get("kind", LATER_KEYS["schedule.kind"]) == "wsd":
        own = {"decay_fraction", "decay_shape", "final_share"}
        shared["schedule"] = {k: v for k, v in choices["schedule"].items() if k not in own}
        del shared["budget"]
    return "trunk-" + config_hash(shared)[:ID_LENGTH]
