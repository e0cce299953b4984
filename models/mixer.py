"""What every sequence mixer is: project, mix, merge; and the registry that configuration names."""

import abc
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.sequence import WholeSequence

Coefficients: TypeAlias = Any
"""What a mixer passes from `project` to `mix` and `merge`: private to it."""


class Pattern(Enum):
    """The four ways of mixing that CAB tells apart (Zhang et al. 2023, section 3)."""

    NONCAUSAL_SELF = "noncausal_self"
    CAUSAL_SELF = "causal_self"
    NONCAUSAL_CROSS = "noncausal_cross"
    CAUSAL_CROSS = "causal_cross"


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

    def build(self, d_model: int, n_residuals: int) -> "Mixer":
        """Make the module.

        Args:
            d_model: width of the residual stream.
            n_residuals: residual branches of the whole backbone, which output maps are scaled by.
        """
        return _mixers[self.kind](self, d_model, n_residuals)


class Mixer(nn.Module, abc.ABC):
    """A token mixer y = merge(M values): M depends on the tokens but not on the values."""

    patterns: ClassVar[frozenset[Pattern]]
    no_decay: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence
    ) -> tuple[Float[Tensor, "B S G P"], Coefficients]:
        """Compute from the tokens what is mixed (values) and what decides how (coefficients)."""

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

    def forward(self, x: Float[Tensor, "B L D"], sequence: WholeSequence) -> Float[Tensor, "B L D"]:
        """Mix the tokens."""
        values, coefficients = self.project(x, sequence)
        return self.merge(self.mix(values, coefficients, sequence), coefficients)

    def materialize(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence
    ) -> Float[Tensor, "B H L S"]:
        """The mixing matrix of each head, read off by mixing the unit vectors."""
        values, coefficients = self.project(x, sequence)
        B, S, G, _ = values.shape
        units = torch.eye(S, dtype=values.dtype, device=values.device)
        units = units[None, :, None, :].expand(B, S, G, S)
        return self.mix(units, coefficients, sequence).permute(0, 2, 1, 3)


def register(config: type[MixerConfig]) -> Callable[[type[Mixer]], type[Mixer]]:
    """Make a mixer known under its configuration's `kind`."""

    def remember(mixer: type[Mixer]) -> type[Mixer]:
        assert config.kind not in _mixers, f"two mixers of kind {config.kind}"
        _mixers[config.kind] = mixer
        _configs[config.kind] = config
        return mixer

    return remember


def mixer_kinds() -> dict[str, type[MixerConfig]]:
    """The configuration class of every mixer, by kind."""
    import models.mixers as family

    for module in pkgutil.walk_packages(family.__path__, prefix=f"{family.__name__}."):
        importlib.import_module(module.name)
    return dict(sorted(_configs.items()))


_mixers: dict[str, type[Mixer]] = {}
_configs: dict[str, type[MixerConfig]] = {}
