"""Architectures as YAML names them: their blocks, parts, and what follows from the width."""

from dataclasses import dataclass, field
from pathlib import Path

from trainer.schema import load, read_yaml

ARCHITECTURES = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class ArchitectureConfig:
    """An architecture without a size.

    Attributes:
        blocks: blocks by name, as in a backbone; `n_heads`, `d_hidden` and `max_len` that a kind
            needs and that are left out are filled in from the rung and the context.
        pattern: as in a backbone.
        layers_ratio: layers per layer of the Transformer.
        hidden_ratio: published inner width of channel mixers over d_model.
        d_model_step: legal step of d_model from 512 on; below, it is 4.
        narrow: keys over the blocks where d_model is below 512: published sizes that make no
            sense there, such as a state larger than the width.
        narrow_options: keys over `narrow` that are tried in turn where no shape reaches a rung
            without them: a state in place of an inner width, where an architecture has none.
        learned_positions: whether absolute places up to the context are learned.
        learning_rate_scale: the architecture's factor on the rung's learning rate.
        learning_rate_evidence: the sweep that the factor was read off, and its rungs.
        model: other keys of the backbone.
    """

    blocks: dict[str, dict]
    pattern: str
    layers_ratio: float = 1.0
    hidden_ratio: float = 8 / 3
    d_model_step: int = 16
    narrow: dict = field(default_factory=dict)
    narrow_options: tuple[dict, ...] = ()
    learned_positions: bool = False
    learning_rate_scale: float = 1.0
    learning_rate_evidence: str = ""
    model: dict = field(default_factory=dict)


def read_architectures() -> dict[str, ArchitectureConfig]:
    """The named architectures that the project ships, one YAML file each."""
    if not _architectures:
        for path in sorted(ARCHITECTURES.glob("*.yaml")):
            _architectures[path.stem] = load(ArchitectureConfig, read_yaml(path), path.stem)
    return _architectures


_architectures: dict[str, ArchitectureConfig] = {}
