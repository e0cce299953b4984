"""Architectures: their blocks and proportions, read from YAML, without a size."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from models.backbone import BackboneConfig
from sweeps.tuning_rule import TuningRule
from trainer.field_checks import require_positive, require_within
from trainer.schema import check_blocks, load, read_yaml

ARCHITECTURES = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class ArchitectureConfig:
    """An architecture without a size."""

    blocks: dict[str, dict]
    """Blocks by name, as model.blocks; n_heads, d_hidden and max_len that a kind needs and that are
    left out are filled in from the rung and the sequence length."""
    pattern: str
    """Names of blocks, separated by spaces, repeated to the depth."""
    layers_ratio: float = 1.0
    """Layers per layer of a Transformer of the rung, as published; the search for a size starts
    from it."""
    hidden_ratio: float = 8 / 3
    """Published inner width of channel mixers over d_model; 8/3 as in Llama (Touvron 2023)."""
    d_model_step: int = 16
    """Step of the widths to try, from d_model 512 on; below, it is 4."""
    narrow: dict = field(default_factory=dict)
    """Keys that replace those of the blocks below d_model 512, where published sizes, such as a
    state larger than the width, make no sense."""
    narrow_options: tuple[dict, ...] = ()
    """Alternatives to `narrow`, tried in turn where no shape comes within 1 % of a rung: a state
    size in place of an inner width, for an architecture that has none."""
    learned_positions: bool = False
    """Learned absolute positions up to the sequence length."""
    learning_rate_scale: float = 1.0
    """The architecture's factor on the rung's learning rate, above 0."""
    learning_rate_evidence: str = ""
    """The search that the factor was read off, and its rungs."""
    tuning: TuningRule | None = None
    """The architecture's own rule for the learning rate, from a search over rate and batch; ladders
    without a learning_rate use it."""
    model: Annotated[dict, BackboneConfig] = field(default_factory=dict)
    """Other keys of the model, such as form or tied."""

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate_scale")
        for name in ("layers_ratio", "hidden_ratio"):
            require_within(self, 1e-3, 1e3, name)
        require_within(self, 1, 4096, "d_model_step")
        if not self.pattern.split():
            raise ValueError("pattern names no block; name those of the layers, such as 'a a b'")
        check_blocks(self.blocks, "blocks")
        for i, part in enumerate((self.narrow, *self.narrow_options)):
            check_blocks(part, f"narrow_options[{i - 1}]" if i else "narrow")


def read_architectures() -> dict[str, ArchitectureConfig]:
    """The named architectures that the project ships, one YAML file each."""
    if not _architectures:
        for path in sorted(ARCHITECTURES.glob("*.yaml")):
            _architectures[path.stem] = load(ArchitectureConfig, read_yaml(path), path.stem)
    return _architectures


_architectures: dict[str, ArchitectureConfig] = {}
