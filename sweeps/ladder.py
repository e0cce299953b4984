"""Named rungs, and the shape that each architecture takes to reach a rung's parameters."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.accounting import total_parameters
from models.backbone import BackboneConfig
from trainer.schema import ConfigError, load, merge, suggest

ADMITTED_ERROR = 0.01
"""A rung is admitted only if every architecture comes this close to its parameters."""


@dataclass(frozen=True)
class Rung:
    """A named size: the Transformer's shape, and at nano sizes its parameters at 257 ids.

    Attributes:
        parameters: nominal size with a vocabulary of 257; None counts the published shape.
    """

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    parameters: int | None = None


@dataclass(frozen=True)
class ArchitectureConfig:
    """An architecture without a size.

    Attributes:
        blocks: blocks by name, as in a backbone, sizes left out.
        pattern: as in a backbone.
        layers_ratio: layers per layer of the Transformer.
        learning_rate_scale: the architecture's factor on the rung's learning rate.
    """

    blocks: dict[str, dict]
    pattern: str
    layers_ratio: float = 1.0
    learning_rate_scale: float = 1.0
    model: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """A backbone on a rung, and how far its parameters are from the rung's."""

    model: BackboneConfig
    parameters: int
    error: float


RUNGS: Mapping[str, Rung] = {
    rung.name: rung
    for rung in (
        # Nano sizes are counts that both first architectures reach within 1 %.
        Rung("10k", 16, 2, 2, 9_780),
        Rung("20k", 24, 2, 2, 19_540),
        Rung("31k", 32, 2, 2, 31_330),
        Rung("68k", 48, 2, 2, 68_180),
        Rung("97k", 48, 3, 2, 97_460),
        Rung("160k", 64, 3, 4, 161_080),
        Rung("460k", 96, 4, 4, 459_900),
        Rung("1M", 128, 5, 4, 1_022_760),
        Rung("125M", 768, 12, 12),
        Rung("360M", 1024, 24, 16),
        Rung("760M", 1536, 24, 12),
        Rung("1.3B", 2048, 24, 16),
        Rung("3B", 2560, 32, 20),
    )
}


def nominal_parameters(rung: Rung, vocab_size: int, tied: bool = True) -> int:
    """The size that budgets and rates of a rung are derived from, the same for all arms."""
    embeddings = (1 if tied else 2) * rung.d_model
    if rung.parameters is not None:
        return rung.parameters + (vocab_size - 257) * embeddings
    block = {"mixer": {"kind": "attention"}, "channel": {"kind": "swiglu"}}
    shape = ArchitectureConfig(blocks={"a": block}, pattern="a")
    published = _Shape(rung.d_model, rung.n_layers, _published_hidden(rung.d_model))
    return _Sizing(shape, rung, vocab_size).count(published)


def fit_architecture(
    name: str,
    architecture: ArchitectureConfig,
    rung: Rung,
    vocab_size: int,
    tolerance: float = ADMITTED_ERROR,
) -> Fitted:
    """The legal shape whose parameters come closest to the rung's.

    Raises:
        ConfigError: none comes within the tolerance.
    """
    target = nominal_parameters(rung, vocab_size)
    sizing = _Sizing(architecture, rung, vocab_size)

    def preference(shape: _Shape) -> tuple[float, float]:
        # Errors under a tenth of a percent are ties: the shape nearest to the published one wins.
        far = abs(sizing.count(shape) / target - 1)
        return round(max(far, 1e-3), 4), shape.distance(rung, architecture.layers_ratio)

    best = min(sizing.shapes(target), key=preference)
    error = sizing.count(best) / target - 1
    if abs(error) > tolerance:
        raise ConfigError(
            f"rung {rung.name} asks for {target} parameters within {tolerance:.0%}, but "
            f"the closest {name} has {sizing.count(best)}; choose another "
            "rung or leave the architecture out"
        )
    return Fitted(sizing.backbone(best), sizing.count(best), error)


def find_rung(name: str) -> Rung:
    """The rung of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RUNGS:
        raise ConfigError(f"unknown rung {name!r}; {suggest(name, list(RUNGS))}")
    return RUNGS[name]


@dataclass(frozen=True)
class _Shape:
    """What the search varies; `d_hidden` is None where no block has a channel mixer."""

    d_model: int
    n_layers: int
    d_hidden: int | None

    def distance(self, rung: Rung, ratio: float) -> float:
        """How far the shape is from the published proportions."""
        wide = abs(math.log(self.d_model / rung.d_model))
        deep = abs(math.log(self.n_layers / (ratio * rung.n_layers)))
        hidden = self.d_hidden or _published_hidden(self.d_model)
        return wide + deep + abs(math.log(hidden / _published_hidden(self.d_model)))


class _Sizing:
    """The shapes of one architecture on one rung, and their parameters."""

    def __init__(self, architecture: ArchitectureConfig, rung: Rung, vocab_size: int) -> None:
        self._architecture, self._rung, self._vocab_size = architecture, rung, vocab_size
        self._period = len(architecture.pattern.split())
        self._counted: dict[_Shape, int] = {}
        blocks = architecture.blocks.values()
        self._has_hidden = any(_hidden(block) for block in blocks)
        self._has_heads = any(_heads(block) for block in blocks)

    def shapes(self, target: int) -> Iterator[_Shape]:
        """Every legal shape near the published proportions."""
        rung = self._rung
        deep = round(self._architecture.layers_ratio * rung.n_layers)
        if self._has_hidden:
            # A rung is a label of the Transformer's shape: where f is free, f alone is searched.
            for d_hidden in self._hidden_widths(target, deep):
                yield _Shape(rung.d_model, deep, d_hidden)
            return
        step = 4 if rung.d_model < 512 else 16
        reach = 0 if self._has_heads else max(step, int(0.35 * rung.d_model) // step * step)
        slack = max(1, int(0.15 * deep))
        for d_model in range(max(step, rung.d_model - reach), rung.d_model + reach + 1, step):
            for n_layers in range(max(1, deep - slack), deep + slack + 1):
                yield _Shape(d_model, n_layers, None)

    def count(self, shape: _Shape) -> int:
        """Parameters of a shape; layers of one kind are built once and multiplied."""
        periods, rest = divmod(shape.n_layers, self._period)
        if rest or periods < 3:
            return self._total(shape)
        one = self._total(replace(shape, n_layers=self._period))
        two = self._total(replace(shape, n_layers=2 * self._period))
        return one + (periods - 1) * (two - one)

    def backbone(self, shape: _Shape) -> BackboneConfig:
        """The configuration of a shape."""
        architecture = self._architecture
        sized = {
            "blocks": {name: self._block(b, shape) for name, b in architecture.blocks.items()},
            "pattern": architecture.pattern,
            "n_layers": shape.n_layers,
            "d_model": shape.d_model,
            "vocab_size": self._vocab_size,
        }
        return load(BackboneConfig, merge(sized, architecture.model), "model")

    def _hidden_widths(self, target: int, deep: int) -> list[int]:
        """The legal inner widths on both sides of the target."""
        d_model = self._rung.d_model
        step = 4 if d_model < 512 else 64
        base = self.count(_Shape(d_model, deep, step))
        slope = self.count(_Shape(d_model, deep, 2 * step)) - base
        steps = max(0.0, (target - base) / slope)
        return [step * (1 + k) for k in (math.floor(steps), math.ceil(steps))]

    def _total(self, shape: _Shape) -> int:
        if shape not in self._counted:
            self._counted[shape] = total_parameters(self.backbone(shape))
        return self._counted[shape]

    def _block(self, block: Mapping[str, Any], shape: _Shape) -> dict[str, Any]:
        sizes: dict[str, Any] = {}
        if _heads(block):
            sizes["mixer"] = {"n_heads": self._rung.n_heads}
        if _hidden(block):
            sizes["channel"] = {"d_hidden": shape.d_hidden}
        return {part: merge(sizes.get(part, {}), given) for part, given in block.items()}


def _heads(block: Mapping[str, Any]) -> bool:
    return block.get("mixer", {}).get("kind") == "attention"


def _hidden(block: Mapping[str, Any]) -> bool:
    return block.get("channel", {}).get("kind") == "swiglu"


def _published_hidden(d_model: int) -> int:
    """8/3 of the width, rounded up to the legal step (Transformer card, D.1)."""
    step = 4 if d_model < 512 else 64
    return math.ceil(8 * d_model / 3 / step) * step
