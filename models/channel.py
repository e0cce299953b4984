"""Channel mixers: what a block does to each token by itself."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Linear


@dataclass(frozen=True)
class ChannelConfig(abc.ABC):
    """The part of a block that mixes channels; `kind` names the class.

    Attributes:
        residuals: residual branches it adds to a block.
    """

    kind: ClassVar[str]
    residuals: ClassVar[int] = 1

    @abc.abstractmethod
    def build(self, d_model: int, n_residuals: int) -> nn.Module | None:
        """Make the module, or None for a block without one."""


@dataclass(frozen=True)
class NoChannelConfig(ChannelConfig):
    """A block that only mixes tokens, as in Mamba."""

    kind: ClassVar[str] = "none"
    residuals: ClassVar[int] = 0

    def build(self, d_model: int, n_residuals: int) -> None:  # noqa: ARG002
        """None."""
        return


@dataclass(frozen=True)
class SwiGLUConfig(ChannelConfig):
    """A gated MLP (Shazeer 2020).

    Attributes:
        d_hidden: inner width.
        initial_std: standard deviation of its initial weights; None scales it with the width.
    """

    kind: ClassVar[str] = "swiglu"
    d_hidden: int
    initial_std: float | None = 0.02

    def __post_init__(self) -> None:
        if self.d_hidden < 1:
            raise ValueError(f"d_hidden {self.d_hidden} is not positive; take about 8/3 d_model")

    def build(self, d_model: int, n_residuals: int) -> nn.Module:
        """Make the module."""
        return SwiGLU(self, d_model, n_residuals)


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x)), the two inner maps stacked in one."""

    def __init__(self, config: SwiGLUConfig, d_model: int, n_residuals: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * config.d_hidden, std=config.initial_std)
        self.down = Linear(
            config.d_hidden, d_model, std=config.initial_std, scale=n_residuals**-0.5
        )

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix the channels of each token."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def channel_kinds() -> dict[str, type[ChannelConfig]]:
    """The configuration class of every channel mixer, by kind."""
    return {config.kind: config for config in (NoChannelConfig, SwiGLUConfig)}
