"""The trained model of a run folder, with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipelines.tokenizers import Tokenizer, load_tokenizer
from models.backbone import Backbone, BackboneConfig
from trainer.config import RunConfig
from trainer.manifest import MODEL_FILE, CheckpointError, inspect, verified_file
from trainer.schema import load, read_yaml
from untrusted.paths import inside


@dataclass(frozen=True)
class TrainedRun:
    """A run's configuration, and the weights of one of its checkpoints.

    Attributes:
        step: of the checkpoint.
    """

    config: RunConfig
    step: int
    weights: dict[str, torch.Tensor]

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
        """The tokenizer that it was trained with."""
        corpus = self.config.corpus
        return load_tokenizer(corpus.tokenizer, inside(data_root, corpus.dataset))


def load_run(folder: Path) -> TrainedRun:
    """Read the newest complete checkpoint of a run.

    Raises:
        ConfigError: the folder holds no run, or a config that today's schema rejects.
        CheckpointError: it has no complete checkpoint.
    """
    config = load(RunConfig, read_yaml(folder / "config.yaml"))
    found = inspect(folder / "checkpoints", None)
    if found is None:
        raise CheckpointError("none", f"{folder} has no checkpoint yet; train it first")
    file = verified_file(found.path, found.manifest, MODEL_FILE)
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise CheckpointError("unreadable", f"{file} cannot be read: {error}") from error
    return TrainedRun(config, found.manifest["step"], weights)
