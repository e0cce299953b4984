"""A mixer in one of its patterns, and the batches that its properties are tried on."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.mixer import Mixer, MixerConfig, Pattern, Slot, mixer_class, mixer_kinds
from models.sequences.continued import Memory
from models.sequences.positions import PADDING
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, drawn, small_config

Rows = tuple[tuple[int, ...], ...]
"""The lengths of the documents of each row."""

ROWS: Rows = ((9, 1, 18, 9), (20, 11, 5, 1))
LENGTH = 37
ONE: Rows = ((LENGTH,), (LENGTH,))
MIXED: Rows = ((LENGTH,), (20, 11, 5, 1))
LONG_LENGTH = 150
LONG: Rows = ((LONG_LENGTH,), (101, 1, 48))
"""Documents beyond the length up to which kernels sum directly what they else transform."""

CAUSAL = frozenset({Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS})
CROSS = frozenset({Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS})
EVERY = frozenset(Pattern)


@dataclass(frozen=True)
class Batch:
    """Features with the documents they belong to, and in a cross pattern those of a memory."""

    x: Tensor
    documents: Tensor
    source: Tensor | None = None
    source_documents: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding."""
        return self.documents != PADDING

    def memory(self) -> Memory | None:
        """The other side, where there is one."""
        if self.source is None or self.source_documents is None:
            return None
        return Memory(self.source, WholeSequence(self.source_documents))

    def replace(self, **tensors: Tensor | None) -> "Batch":
        """The batch with other tensors."""
        return dataclasses.replace(self, **tensors)

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        return {"x": self.x} | ({} if self.source is None else {"source": self.source})

    def following(self) -> "Batch":
        """The batch with features that record gradients."""
        return self.replace(**{n: t.detach().requires_grad_() for n, t in self.leaves().items()})

    def to(self, dtype: torch.dtype) -> "Batch":
        """The batch with features of another dtype."""
        return self.replace(**{name: tensor.to(dtype) for name, tensor in self.leaves().items()})

    def moved(self, device: str) -> "Batch":
        """The batch on another device."""
        parts = (self.x, self.documents, self.source, self.source_documents)
        x, documents, *memory = (None if t is None else t.to(device) for t in parts)
        assert x is not None
        assert documents is not None
        return Batch(x, documents, *memory)

    def row(self, row: int) -> "Batch":
        """One row of it, without its padding."""
        return self.replace(**{name: t[None] for name, t in self._of(row, None).items()})

    def document(self, row: int, number: int) -> "Batch":
        """One document of one row by itself."""
        parts = {name: t[None] for name, t in self._of(row, number).items()}
        for name in ("documents", "source_documents"):
            if name in parts:
                parts[name] = torch.zeros_like(parts[name])
        return self.replace(**parts)

    def places(self) -> Iterator[tuple[int, int]]:
        """Row and number of every document."""
        for row, ids in enumerate(self.documents.tolist()):
            yield from ((row, number) for number in range(max(ids) + 1))

    def _of(self, row: int, number: int | None) -> dict[str, Tensor]:
        own = self.documents[row]
        taken = own != PADDING if number is None else own == number
        parts = {"x": self.x[row][taken], "documents": own[taken]}
        if self.source is not None and self.source_documents is not None:
            other = self.source_documents[row]
            taken = other != PADDING if number is None else other == number
            parts |= {"source": self.source[row][taken], "source_documents": other[taken]}
        return parts


@dataclass(frozen=True)
class Case:
    """A kind of mixer in one pattern."""

    kind: str
    pattern: Pattern
    config: MixerConfig

    @functools.cached_property
    def mixer(self) -> Mixer:
        """The mixer in float32, the same at each call: nothing may change it."""
        return self.fresh()

    @functools.cached_property
    def wide(self) -> Mixer:
        """The same in float64."""
        return self.fresh().double()

    @functools.cached_property
    def max_len(self) -> int | None:
        """The longest document it can mix; None where there is no longest."""
        configs = (getattr(module, "config", None) for module in self.mixer.modules())
        lengths = (getattr(config, "max_len", None) for config in configs)
        return min((n for n in lengths if n is not None), default=None)

    @functools.cached_property
    def longer(self) -> "Case":
        """The same with a `max_len`, where there is one, that long documents fit in."""
        return dataclasses.replace(self, config=_lengthened(self.config))

    @property
    def cross(self) -> bool:
        """Whether it mixes in a memory."""
        return self.pattern in CROSS

    @property
    def family(self) -> str:
        """The folder that its file is in."""
        return type(self.mixer).__module__.split(".")[-2]

    def construct(self, pattern: Pattern) -> Mixer:
        """A mixer for a pattern, without initial values."""
        return self.config.build(Slot(D_MODEL, 2, pattern))

    def fresh(self, seed: int = 0) -> Mixer:
        """A mixer of its own."""
        return drawn(self.construct(self.pattern), seed)

    def sizes(self, rows: Rows) -> tuple[tuple["Case", Rows], ...]:
        """What to try: the mixer on these rows, and on long ones."""
        return (self, rows), (self.longer, LONG)

    def batch(self, rows: Rows = ROWS, seed: int = 1, length: int | None = None) -> Batch:
        """Random features for documents of these lengths, each row filled up to `length`."""
        generator = torch.Generator().manual_seed(seed)
        x, documents = _features(rows, generator, length)
        if not self.cross:
            return Batch(x, documents)
        sources = tuple(tuple(n // 2 + 2 for n in row) for row in rows)
        return Batch(x, documents, *_features(sources, generator, length))


@functools.cache
def case_of(kind: str, pattern: Pattern) -> Case:
    """The case of a registered mixer; all properties share it."""
    return Case(kind, pattern, small_config(kind))


def declared_cases() -> list[tuple[str, Pattern]]:
    """Every registered kind with every pattern it declares."""
    return [
        (kind, pattern)
        for kind in mixer_kinds()
        for pattern in sorted(mixer_class(kind).patterns, key=lambda p: p.value)
    ]


def run(mixer: Mixer, batch: Batch) -> Tensor:
    """The outputs of a mixer for a batch, in the mixer's own dtype."""
    batch = batch.to(dtype_of(mixer))
    return mixer(batch.x, WholeSequence(batch.documents), batch.memory())


def dtype_of(mixer: Mixer) -> torch.dtype:
    """The dtype of its parameters."""
    return next(mixer.parameters()).dtype


def gradients(mixer: Mixer, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the sum of squares of all real outputs, by name; zeros where there is none."""
    batch = batch.to(dtype_of(mixer)).following()
    leaves = leaves_of(mixer, batch)
    loss = run(mixer, batch)[batch.real].square().sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def leaves_of(mixer: Mixer, batch: Batch) -> dict[str, Tensor]:
    """What gradients are taken of, by name: features and parameters."""
    return batch.leaves() | dict(mixer.named_parameters())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Hold the norm of a difference against that of the expected."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    assert error <= tolerance * max(scale, 1e-30), f"{what}: off by {error:.2e} of {scale:.2e}"


def assert_close_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> None:
    """Hold gradients in float32 against others; small ones against the largest of them all."""
    floor = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name].double() - gradient.double()).norm().item()
        scale = max(gradient.norm().item(), 1e-3 * floor)
        assert error <= 1e-4 * scale, f"{what}, {name}: off by {error:.2e} of {scale:.2e}"


def refusal(attempt: Callable[[], object]) -> str:
    """What a ValueError says, or `nothing`."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "nothing"


def documents_of(rows: Rows, length: int | None = None) -> Tensor:
    """Document ids of rows that hold documents of these lengths, then padding."""
    longest = max(sum(row) for row in rows)
    ids = torch.full((len(rows), max(longest, length or 0)), PADDING, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        numbers = torch.arange(len(lengths), dtype=torch.int32)
        ids[row, : sum(lengths)] = numbers.repeat_interleave(torch.tensor(lengths))
    return ids


def _lengthened(config: Any) -> Any:
    """A configuration, those inside it too, with a `max_len` that is long where there is one."""
    if isinstance(config, tuple):
        return tuple(_lengthened(part) for part in config)
    if isinstance(config, Mapping):
        return {name: _lengthened(part) for name, part in config.items()}
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed = {f.name: _lengthened(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if changed.get("max_len") is not None:
        changed["max_len"] = LONG_LENGTH
    return dataclasses.replace(config, **changed)


def _features(rows: Rows, generator: torch.Generator, length: int | None) -> tuple[Tensor, Tensor]:
    documents = documents_of(rows, length)
    return torch.randn(*documents.shape, D_MODEL, generator=generator), documents
