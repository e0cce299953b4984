"""The trained model of a run folder, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from models.backbone import Backbone, BackboneConfig
from trainer.config import RunConfig
from trainer.identity import require_same
from trainer.ids import dataset_ids, weights_ids
from trainer.manifest import MODEL_FILE, CheckpointError, hash_weights, inspect, verified_file
from trainer.record_checks import read_whole_run, recorded_ids
from trainer.schema import ConfigError, load, read_yaml
from untrusted.paths import inside


@dataclass(frozen=True)
class TrainedRun:
    """A run's configuration, and the weights of one of its checkpoints.

    Attributes:
        checkpoint: whose weights these are.
        facts: its manifest.
    """

    config: RunConfig
    checkpoint: Path
    facts: dict
    weights: dict[str, torch.Tensor]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.facts["step"]

    def backbone(self, model: BackboneConfig | None = None) -> Backbone:
        """The model with its weights; another configuration must have the same parameters.

        Raises:
            RuntimeError: the configuration has other parameters.
        """
        with torch.device("meta"):
            backbone = Backbone(model or self.config.model)
        backbone.to_empty(device="cpu")
        backbone.load_state_dict(self.weights, strict=True)
        return backbone.eval()

    def tokenizer(self, data_root: Path) -> Tokenizer:
        """The tokenizer that it was trained with.

        Raises:
            IdentityError: the dataset has another one now.
        """
        corpus = self.config.corpus
        tokenizer = load_tokenizer(corpus.tokenizer, inside(data_root, corpus.dataset))
        self._require_data({"tokenizer_fingerprint": tokenizer.fingerprint}, data_root)
        return tokenizer

    def require_same_data(self, data_root: Path) -> None:
        """Check that the dataset is the one that it was trained on.

        Raises:
            IdentityError: it is another one.
        """
        self._require_data(dataset_ids(self.config.corpus, data_root), data_root)

    def _require_data(self, ids: dict[str, str], data_root: Path) -> None:
        require_same(
            str(self.checkpoint),
            self.facts,
            ids,
            of=str(inside(data_root, self.config.corpus.dataset)),
            remedy="give --data the folder of the dataset that the run was trained on",
        )


def only_run(folder: Path) -> Path:
    """The folder of a run; of a sweep's folder, its one run.

    Raises:
        ConfigError: it is a sweep of several runs, or holds no run.
    """
    if (folder / "config.yaml").exists():
        return folder
    if not (folder / "sweep.yaml").exists():
        found = sorted(path.parent for path in folder.glob("*/config.yaml"))
        which = f"give the folder of a run, such as {found[0]}" if found else "train one first"
        raise ConfigError(
            f"{folder / 'config.yaml'} does not exist, so {folder} is no run's folder; {which}"
        )
    runs = [str(run) for run in read_yaml(folder / "sweep.yaml").get("runs") or []]
    if len(runs) != 1:
        which = f"give one of them, such as {inside(folder, runs[0])}" if runs else "train it first"
        raise ConfigError(f"{folder} is a sweep of {len(runs)} runs; {which}")
    return inside(folder, runs[0])


def load_run(folder: Path) -> TrainedRun:
    """Read the newest complete checkpoint of a run.

    Raises:
        ConfigError: the folder holds no run, or a config that today's schema rejects.
        IdentityError: its config, its record and the checkpoint are not of one run.
        CheckpointError: it has no complete checkpoint.
    """
    stored = read_yaml(folder / "config.yaml")
    config, record = load(RunConfig, stored), read_whole_run(folder)
    found = inspect(folder / "checkpoints", None)
    if found is None:
        raise CheckpointError("none", f"{folder} has no checkpoint yet; train it first")
    file = verified_file(found.path, found.manifest, MODEL_FILE)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise CheckpointError("unreadable", f"{file} cannot be read: {error}") from error
    step = found.manifest["step"]
    require_same(
        str(found.path),
        {**found.manifest, "parameters_sha256": hash_weights(weights)},
        {**weights_ids(config, stored, step), **recorded_ids(record, step)},
        of=f"the record in {folder}",
        remedy=f"move {found.path.name} away, or restore the files of that folder",
    )
    return TrainedRun(config, found.path, found.manifest, weights)
