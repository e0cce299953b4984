"""Size an architecture: find the width, depth and inner width that match a rung's parameters."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.accounting import total_parameters
from models.backbone import BackboneConfig
from models.channel import channel_kinds
from models.mixer import mixer_kinds
from models.ranges import check_range
from sweeps.architecture import ArchitectureConfig
from sweeps.rungs import Rung
from trainer.schema import ConfigError, load, merge

ADMITTED_ERROR = 0.01
"""A rung is admitted only if every architecture comes this close to its parameters."""
OVERRIDDEN_ERROR = 0.5
"""The same where the sweep replaces keys of the model; an untied head alone may add a third."""
NARROW = 512
"""Below this width steps are fine, and an architecture's `narrow` keys apply; under muP the base
width decides on the keys, because all widths share their sizes."""


@dataclass(frozen=True)
class Sized:
    """A backbone on a rung, and how far its parameters are from the rung's."""

    model: BackboneConfig
    parameters: int
    error: float


@dataclass(frozen=True)
class Shape:
    """What an architecture is sized for: a rung at a vocabulary and a context length.

    Attributes:
        seq_len: the context, which mixers with a longest length are built for.
    """

    rung: Rung
    vocab_size: int
    seq_len: int


def nominal_parameters(rung: Rung, vocab_size: int, tied: bool = True) -> int:
    """The size that budgets and rates of a rung are derived from, the same for all arms."""
    embeddings = (1 if tied else 2) * rung.d_model
    if rung.parameters is not None:
        return rung.parameters + (vocab_size - 257) * embeddings
    block = {"mixer": {"kind": "attention"}, "channel": {"kind": "swiglu"}}
    shape = ArchitectureConfig(blocks={"a": block}, pattern="a")
    hidden = _round_up(8 / 3 * rung.d_model, 64)
    sizing = _Sizing(shape, Shape(rung, vocab_size, seq_len=1))
    return sizing.count(_Shape(rung.d_model, rung.n_layers, hidden))


def size_architecture(
    name: str,
    architecture: ArchitectureConfig,
    place: Shape,
    tolerance: float = ADMITTED_ERROR,
) -> Sized:
    """The legal shape whose parameters come closest to the rung's.

    A rung is a label of the Transformer's shape. Where an inner width is free, width and depth
    stay as published and the inner width alone is searched, if that reaches the tolerance; else,
    and where no inner width is free, width, depth and inner width are searched together.

    Raises:
        ConfigError: none comes within the tolerance.
    """
    fitted = _closest(name, architecture, place)
    for option in architecture.narrow_options:
        if abs(fitted.error) <= ADMITTED_ERROR:
            break
        other = replace(architecture, narrow=merge(architecture.narrow, option))
        fitted = min(fitted, _closest(name, other, place), key=lambda each: abs(each.error))
    if abs(fitted.error) > tolerance:
        target = nominal_parameters(place.rung, place.vocab_size)
        raise ConfigError(
            f"rung {place.rung.name} asks for {target} parameters within {tolerance:.0%}, but "
            f"the closest {name} has {fitted.parameters}; choose another rung or remove the "
            "architecture"
        )
    return fitted


def published_backbone(architecture: ArchitectureConfig, place: Shape) -> BackboneConfig:
    """The backbone of the rung's own width and depth, whatever its parameters."""
    d_model, n_layers = place.rung.d_model, place.rung.n_layers
    hidden = _round_up(architecture.hidden_ratio * d_model, 4)
    return _Sizing(architecture, place).backbone(_Shape(d_model, n_layers, hidden))


def _closest(name: str, architecture: ArchitectureConfig, place: Shape) -> Sized:
    target = nominal_parameters(place.rung, place.vocab_size)
    sizing = _Sizing(architecture, place)

    def preference(shape: _Shape) -> tuple[float, float]:
        # Errors under a tenth of a percent are ties: the shape nearest to the published one wins.
        far = abs(sizing.count(shape) / target - 1)
        return round(max(far, 1e-3), 4), sizing.distance(shape)

    best = min(sizing.published_shapes(target), key=preference, default=None)
    if best is None or abs(sizing.count(best) / target - 1) > ADMITTED_ERROR:
        best = min(sizing.shapes(target), key=preference, default=None)
    if best is None:
        raise ConfigError(
            f"{name} has no legal shape near rung {place.rung.name}: {sizing.problem}"
        )
    return Sized(sizing.backbone(best), sizing.count(best), sizing.count(best) / target - 1)


@dataclass(frozen=True)
class _Shape:
    """What the search varies; `d_hidden` is None where no block has a channel mixer."""

    d_model: int
    n_layers: int
    d_hidden: int | None


class _Sizing:
    """The shapes of one architecture at one place, and their parameters.

    Attributes:
        problem: why the first illegal width was refused.
    """

    def __init__(self, architecture: ArchitectureConfig, place: Shape) -> None:
        self._architecture, self._place = architecture, place
        self._names = architecture.pattern.split()
        self._deep = max(1, round(architecture.layers_ratio * place.rung.n_layers))
        self._counted: dict[tuple[str, int, int | None], tuple[int, int]] = {}
        self.problem: ValueError | None = None
        self._has_hidden = any(
            "d_hidden" in _missing(part)
            for block in architecture.blocks.values()
            for part in _parts(block)
        )

    def published_shapes(self, target: int) -> Iterator[_Shape]:
        """The published width and depth, with the inner widths on both sides of the target."""
        d_model = self._place.rung.d_model
        if self._has_hidden and self._may_be_wide(d_model) and self._legal(d_model):
            depth = min(self._depths(), key=lambda n: abs(n - self._deep))
            yield from self._with_hidden(d_model, depth, target)

    def shapes(self, target: int) -> Iterator[_Shape]:
        """Every legal shape near the published proportions."""
        wide = self._place.rung.d_model
        step = 4 if wide < NARROW else self._architecture.d_model_step
        reach = max(step, int(0.35 * wide) // step * step)
        first = _round_up(max(step, wide - reach), step)
        widths = filter(self._may_be_wide, range(first, wide + reach + 1, step))
        for d_model in filter(self._legal, list(widths) or self._given("d_model")):
            for n_layers in self._depths():
                if self._has_hidden:
                    yield from self._with_hidden(d_model, n_layers, target)
                else:
                    yield _Shape(d_model, n_layers, None)

    def distance(self, shape: _Shape) -> float:
        """How far the shape is from the published proportions."""
        wide = abs(math.log(shape.d_model / self._place.rung.d_model))
        deep = abs(math.log(shape.n_layers / self._deep))
        published = self._architecture.hidden_ratio * shape.d_model
        return wide + deep + abs(math.log((shape.d_hidden or published) / published))

    def count(self, shape: _Shape) -> int:
        """Parameters of a shape; each kind of layer is built once and multiplied."""
        size = (shape.d_model, shape.d_hidden)
        layers = [self._names[i % len(self._names)] for i in range(shape.n_layers)]
        rest, _ = self._block_counts(layers[0], *size)
        return rest + sum(self._block_counts(name, *size)[1] for name in layers)

    def backbone(self, shape: _Shape) -> BackboneConfig:
        """The configuration of a shape."""
        return self._build(self._architecture.pattern, shape)

    def _build(self, pattern: str, shape: _Shape) -> BackboneConfig:
        architecture = self._architecture
        blocks = architecture.blocks
        if self._reference_width(shape) < NARROW:
            blocks = merge(blocks, architecture.narrow)
        sized = {
            "blocks": {name: self._filled(block, shape) for name, block in blocks.items()},
            "pattern": pattern,
            "n_layers": shape.n_layers,
            "d_model": shape.d_model,
            "vocab_size": self._place.vocab_size,
            "learned_positions": self._place.seq_len if architecture.learned_positions else None,
        }
        return load(BackboneConfig, merge(sized, architecture.model), "model")

    def _reference_width(self, shape: _Shape) -> int:
        mup = self._architecture.model.get("mup")
        base = mup.get("base_width") if isinstance(mup, Mapping) else None
        return base if isinstance(base, int) else shape.d_model

    def _block_counts(self, name: str, d_model: int, d_hidden: int | None) -> tuple[int, int]:
        """Parameters outside all layers, and of one layer."""
        key = (name, d_model, d_hidden)
        if key not in self._counted:
            one, two = (
                total_parameters(self._build(name, _Shape(d_model, n, d_hidden))) for n in (1, 2)
            )
            self._counted[key] = (2 * one - two, two - one)
        return self._counted[key]

    def _with_hidden(self, d_model: int, n_layers: int, target: int) -> Iterator[_Shape]:
        """A width and depth with the legal inner widths on both sides of the target."""
        step = 4 if d_model < NARROW else 64
        base = self.count(_Shape(d_model, n_layers, step))
        slope = self.count(_Shape(d_model, n_layers, 2 * step)) - base
        steps = max(0.0, (target - base) / slope)
        for k in {math.floor(steps), math.ceil(steps)}:
            yield _Shape(d_model, n_layers, step * (1 + k))

    def _given(self, key: str) -> list[int]:
        """What the architecture's or the sweep's model keys say of a size; empty if nothing."""
        value = self._architecture.model.get(key)
        if value is None:
            return []
        size = int(value)
        try:
            check_range(f"model.{key}", size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return [size]

    def _may_be_wide(self, d_model: int) -> bool:
        return d_model in (self._given("d_model") or [d_model])

    def _depths(self) -> list[int]:
        """Numbers of layers within 15 % or one of the published; whole patterns if there are."""
        if given := self._given("n_layers"):
            return given
        slack = max(1, int(0.15 * self._deep))
        near = range(max(1, self._deep - slack), self._deep + slack + 1)
        return [n for n in near if n % len(self._names) == 0] or list(near)

    def _legal(self, d_model: int) -> bool:
        """Whether every mixer fits into the width."""
        try:
            hidden = 4 if d_model < NARROW else 64
            for name in dict.fromkeys(self._names):
                self._block_counts(name, d_model, hidden if self._has_hidden else None)
        except ValueError as error:
            self.problem = self.problem or error
            return False
        return True

    def _filled(self, block: Mapping[str, Any], shape: _Shape) -> dict[str, Any]:
        return {
            slot: merge(self._sizes(part, shape), part) if isinstance(part, Mapping) else part
            for slot, part in block.items()
        }

    def _sizes(self, part: Mapping[str, Any], shape: _Shape) -> dict[str, Any]:
        """Values of the required fields that the architecture leaves to the rung."""
        sizes = {
            "n_heads": fitting_heads(shape.d_model, self._place.rung),
            "d_hidden": shape.d_hidden,
            "max_len": self._place.seq_len,
        }
        filled = {name: sizes[name] for name in _missing(part) if name in sizes}
        # The parts of a parallel mixer are mixers themselves.
        if isinstance(part.get("mixers"), Mapping):
            filled["mixers"] = {n: self._sizes(each, shape) for n, each in part["mixers"].items()}
        return filled


def fitting_heads(d_model: int, rung: Rung) -> int:
    """The number of heads nearest to the rung's whose widths are even and whole."""
    fitting = [n for n in range(1, d_model // 2 + 1) if d_model % (2 * n) == 0]
    return min(fitting, key=lambda n: (abs(math.log(n / rung.n_heads)), n), default=1)


def _parts(block: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (part for part in block.values() if isinstance(part, Mapping))


def _missing(part: Mapping[str, Any]) -> list[str]:
    """Required fields of a mixer or channel mixer that are not given."""
    kind = {**mixer_kinds(), **channel_kinds()}.get(str(part.get("kind")))
    if kind is None:
        return []
    return [
        each.name
        for each in dataclasses.fields(kind)
        if each.default is each.default_factory is dataclasses.MISSING and each.name not in part
    ]


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
