"""The interface of all sequence mixers (project, mix, merge), and their registry by kind."""

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

from models.mup import MupConfig
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence

Coefficients: TypeAlias = Any
"""What a mixer passes from `project` to `mix` and `merge`; its type is private to the mixer."""


class Pattern(Enum):
    """The four attention patterns of CAB (Zhang et al. 2023, section 3)."""

    NONCAUSAL_SELF = "noncausal_self"
    CAUSAL_SELF = "causal_self"
    NONCAUSAL_CROSS = "noncausal_cross"
    CAUSAL_CROSS = "causal_cross"


@dataclass(frozen=True)
class Slot:
    """A mixer's place in a backbone.

    Attributes:
        d_model: width of the residual stream.
        n_residuals: residual branches of the whole backbone, for the scale of output maps.
        pattern: which tokens it may see.
        mup: the parametrisation; None for the standard one.
    """

    d_model: int
    n_residuals: int = 1
    pattern: Pattern = Pattern.CAUSAL_SELF
    mup: MupConfig | None = None

    @property
    def causal(self) -> bool:
        """Whether an output may depend on its own and earlier tokens alone."""
        return self.pattern in (Pattern.CAUSAL_SELF, Pattern.CAUSAL_CROSS)

    @property
    def residual_scale(self) -> float:
        """Factor on the initial weights of maps that write to the residual stream."""
        return self.n_residuals**-0.5

    def scaled(self, queries: Float[Tensor, "B L H P"]) -> Float[Tensor, "B L H P"]:
        """Queries for scores that are divided by sqrt(P) later on; unchanged without muP."""
        if self.mup is None or self.mup.base_head_dim is None:
            return queries
        return queries * self.mup.head_share(queries.shape[-1]) ** 0.5


@dataclass(frozen=True)
class MixFlops:
    """Forward FLOPs of `mix` for one sequence, a multiply-add counted as two.

    Attributes:
        needed: matrix products that the algorithm needs, causality taken into account.
        full_square: the same with every query-key pair counted, as profilers do.
        elementwise: scans and other pointwise work, which do not run on matrix units.
    """

    needed: float = 0.0
    full_square: float = 0.0
    elementwise: float = 0.0


@dataclass(frozen=True)
class MixerConfig:
    """Configuration of a token mixer; `kind` names the class."""

    kind: ClassVar[str]

    def build(self, slot: Slot) -> "Mixer":
        """Make the module.

        Raises:
            ValueError: the mixer does not support the slot's pattern, or its sizes do not fit.
        """
        mixer = _mixers[self.kind]
        if slot.pattern not in mixer.patterns:
            served = ", ".join(sorted(pattern.value for pattern in mixer.patterns))
            raise ValueError(
                f"mixer {self.kind} is used in the pattern {slot.pattern.value}, but supports "
                f"{served}; choose another mixer or another form of backbone"
            )
        # Every mixer takes its own configuration before the slot; the base class takes none.
        return mixer(self, slot)  # pyright: ignore[reportCallIssue]


class Mixer(nn.Module, abc.ABC):
    """A token mixer y = merge(M values), where the matrix M may depend on the tokens.

    Attributes:
        patterns: the patterns it supports; the slot selects one.
        sharded: the patterns in which it supports sequence parallelism
            (`models.sequences.sharded`).
        no_decay: names of its parameters that are excluded from weight decay.
        approximate: why outputs are not an exact function of the visible tokens; empty if they are.
        linear: whether `mix` is linear in the values.
        uses_fft: whether outputs may depend on later tokens through the rounding of an FFT; the
            mixer then has `filter_norm()`, the largest 1-norm of a filter.
        stops_nan: whether even a NaN stays within its document.
        constant_state: whether the decoding state has the same size after any number of tokens.
        ordered_memory: whether the order of a memory's tokens matters.
        traced: whether torch.compile may trace `mix`: plain torch without loops over tiles.
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
        """Compute the values and the coefficients that determine the mixing matrix.

        Args:
            x: features of the tokens, zero in padding.
            sequence: the sequence of the tokens.
            memory: the encoded source in a cross pattern; the values come from it.
        """

    @abc.abstractmethod
    def mix(
        self, values: Float[Tensor, "B S G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Apply the mixing matrix to the values."""

    @abc.abstractmethod
    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Project the mixed values to the width of the residual stream."""

    @abc.abstractmethod
    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Count one forward `mix` for the last `queries` of `keys` tokens."""

    def forward(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B L D"]:
        """Mix the tokens; features in padding are not read."""
        values, coefficients = self.project(sequence.without_padding(x), sequence, memory)
        return self.merge(self.mix(values, coefficients, sequence), coefficients)

    def unsharded(self) -> str:
        """Why it does not support sequence parallelism here; empty if it does."""
        pattern = self.slot.pattern
        return "" if pattern in self.sharded else f"no sharded form for {pattern.value}"

    def materialize(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B H L S"]:
        """The mixing matrix of each head, obtained by mixing unit vectors."""
        values, coefficients = self.project(sequence.without_padding(x), sequence, memory)
        B, S, G, _ = values.shape
        units = torch.eye(S, dtype=values.dtype, device=values.device)
        # Unit vector s as the value of token s: output t is then row t of the matrix.
        units = units[None, :, None, :].expand(B, S, G, S)
        return self.mix(units, coefficients, sequence).permute(0, 2, 1, 3)


Registered = TypeVar("Registered", bound=Mixer)


def register(config: type[MixerConfig]) -> Callable[[type[Registered]], type[Registered]]:
    """Class decorator: register a mixer under its configuration's `kind`."""

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
    """Check that every mixer of a backbone supports sequence parallelism.

    Raises:
        ValueError: some do not; the message names them.
    """
    found = {
        f"{path} ({type(module).__name__}): {module.unsharded()}"
        for path, module in backbone.named_modules()
        if isinstance(module, Mixer) and module.unsharded()
    }
    if found:
        able = [kind for kind in mixer_kinds() if mixer_class(kind).sharded]
        raise ValueError(
            f"sequence parallelism is on, but {'; '.join(sorted(found))}. Turn it off, or choose "
            f"among the mixers with a sharded form: {', '.join(able)}"
        )
