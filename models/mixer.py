"""What every sequence mixer is: project, mix, merge; and the registry that configuration names."""

import abc
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence

Coefficients: TypeAlias = Any
"""What a mixer passes from `project` to `mix` and `merge`: private to it."""


class Pattern(Enum):
    """The four ways of mixing that CAB tells apart (Zhang et al. 2023, section 3)."""

    NONCAUSAL_SELF = "noncausal_self"
    CAUSAL_SELF = "causal_self"
    NONCAUSAL_CROSS = "noncausal_cross"
    CAUSAL_CROSS = "causal_cross"


@dataclass(frozen=True)
class Slot:
    """Where a mixer stands in a backbone, and what is asked of it there.

    Attributes:
        d_model: width of the residual stream.
        n_residuals: residual branches of the whole backbone, which output maps are scaled by.
        pattern: what it may see.
    """

    d_model: int
    n_residuals: int = 1
    pattern: Pattern = Pattern.CAUSAL_SELF

    @property
    def causal(self) -> bool:
        """Whether an output may depend on its own and earlier tokens alone."""
        return self.pattern in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)

    @property
    def residual_scale(self) -> float:
        """Factor on the initial weights of maps that write to the residual stream."""
        return self.n_residuals**-0.5


@dataclass(frozen=True)
class MixFlops:
    """Forward FLOPs of `mix` for one sequence, a multiply-add counted as two.

    Attributes:
        needed: products that the algorithm needs, causality taken into account.
        full_square: the same with every query-key pair counted, as profilers do.
        elementwise: scan and other pointwise work that no matrix unit can do.
    """

    needed: float = 0.0
    full_square: float = 0.0
    elementwise: float = 0.0


@dataclass(frozen=True)
class MixerConfig:
    """The part of a block that mixes tokens; `kind` names the class."""

    kind: ClassVar[str]

    def build(self, slot: Slot) -> "Mixer":
        """Make the module.

        Raises:
            ValueError: the mixer does not serve the slot's pattern, or its sizes do not fit.
        """
        mixer = _mixers[self.kind]
        if slot.pattern not in mixer.patterns:
            served = ", ".join(sorted(pattern.value for pattern in mixer.patterns))
            raise ValueError(
                f"mixer {self.kind} is asked for {slot.pattern.value}, but serves {served}; "
                "choose another mixer or another form of backbone"
            )
        # Every mixer takes its own configuration before the slot; the base class takes none.
        return mixer(self, slot)  # pyright: ignore[reportCallIssue]


class Mixer(nn.Module, abc.ABC):
    """A token mixer y = merge(M values): M depends on the tokens but not on the values.

    Attributes:
        patterns: which of CAB's four it can serve; the slot decides which it does.
        sharded: in which of them its tokens may be cut over ranks (`models.sequences.sharded`).
        no_decay: names of its parameters that weight decay must not touch.
        approximate: why it is no exact function of what a token may see; empty where it is one.
        linear: whether `mix` is linear in the values.
        uses_fft: whether rounding may carry a trace of later tokens, as that of an FFT does; the
            mixer then has `filter_norm()`, the largest 1-norm of a filter.
        stops_nan: whether not even a NaN gets from one document of a row into another.
        constant_state: whether decoding keeps as many bytes after any number of tokens.
        ordered_memory: whether the order of a memory's tokens matters.
        traced: whether torch.compile may look into `mix`: plain torch, no loops over tiles.
    """

    patterns: ClassVar[frozenset[Pattern]]
    sharded: ClassVar[frozenset[Pattern]] = frozenset()
    no_decay: ClassVar[frozenset[str]] = frozenset()
    approximate: ClassVar[str] = ""
    linear: ClassVar[bool] = True
    uses_fft: ClassVar[bool] = False
    stops_nan: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False
    ordered_memory: ClassVar[bool] = False
    traced: ClassVar[bool] = False

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    @abc.abstractmethod
    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S G P"], Coefficients]:
        """Compute from the tokens what is mixed (values) and what decides how (coefficients).

        Args:
            x: features of the tokens, zero where there is padding.
            sequence: the tokens at hand.
            memory: in a cross pattern the other side, which the values come from.
        """

    @abc.abstractmethod
    def mix(
        self, values: Float[Tensor, "B S G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply the matrix that the coefficients describe; linear in the values."""

    @abc.abstractmethod
    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Bring the mixed values back to the residual stream's width."""

    @abc.abstractmethod
    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Count one forward `mix` of a sequence whose last `queries` tokens see `keys` tokens."""

    def forward(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B L D"]:
        """Mix the tokens; what stands in padding is never read."""
        values, coefficients = self.project(sequence.without_padding(x), sequence, memory)
        return self.merge(self.mix(values, coefficients, sequence), coefficients)

    def unsharded(self) -> str:
        """Why its tokens cannot be cut over ranks; empty where they can."""
        return "" if self.slot.pattern in self.sharded else f"no form for {self.slot.pattern.value}"

    def materialize(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B H L S"]:
        """The mixing matrix of each head, read off by mixing the unit vectors."""
        values, coefficients = self.project(sequence.without_padding(x), sequence, memory)
        B, S, G, _ = values.shape
        units = torch.eye(S, dtype=values.dtype, device=values.device)
        units = units[None, :, None, :].expand(B, S, G, S)
        return self.mix(units, coefficients, sequence).permute(0, 2, 1, 3)


Registered = TypeVar("Registered", bound=Mixer)


def register(config: type[MixerConfig]) -> Callable[[type[Registered]], type[Registered]]:
    """Make a mixer known under its configuration's `kind`."""

    def remember(mixer: type[Registered]) -> type[Registered]:
        assert config.kind not in _mixers, f"two mixers of kind {config.kind}"
        _mixers[config.kind] = mixer
        _configs[config.kind] = config
        return mixer

    return remember


def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """The configuration class of every mixer, by kind."""
    # Found by their folder, as plug-ins are: this file may not know who builds on it.
    folder = Path(__file__).parent / "mixers"
    for module in pkgutil.walk_packages([str(folder)], prefix="models.mixers."):
        importlib.import_module(module.name)
    return dict(sorted(_configs.items()))


def mixer_class(kind: str) -> type[Mixer]:
    """The mixer of that kind."""
    mixer_kinds()
    return _mixers[kind]


_mixers: dict[str, type[Mixer]] = {}
_configs: dict[str, type[MixerConfig]] = {}


def refuse_unsharded(backbone: nn.Module) -> None:
    """Refuse a backbone that cannot run on shards of a sequence.

    Raises:
        ValueError: a mixer has no sharded form in its place; all of them are named.
    """
    found = {
        f"{path} ({type(module).__name__}): {module.unsharded()}"
        for path, module in backbone.named_modules()
        if isinstance(module, Mixer) and module.unsharded()
    }
    if found:
        able = [kind for kind in mixer_kinds() if mixer_class(kind).sharded]
        raise ValueError(
            f"the sequence is to be cut over ranks, but {'; '.join(sorted(found))}. Do not cut it, "
            f"or choose among the mixers with a sharded form: {', '.join(able)}"
        )
