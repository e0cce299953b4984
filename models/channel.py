"""Channel mixers: the MLPs of a block, which act on each token separately."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.rowwise.swiglu import swiglu
from models.parts.layers import BlockDiagonal, Linear
from models.parts.monarch_matrix import monarch_multiply


@dataclass(frozen=True)
class ChannelConfig(abc.ABC):
    """Configuration of a channel mixer; `kind` names the class.

    Attributes:
        residuals: residual branches that it adds to a block.
    """

    kind: ClassVar[str]
    residuals: ClassVar[int] = 1

    @abc.abstractmethod
    def build(self, d_model: int, n_residuals: int) -> nn.Module | None:
        """Make the module, or None for a block without one."""


@dataclass(frozen=True)
class NoChannelConfig(ChannelConfig):
    """No channel mixer, as in Mamba's blocks."""

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
    """y = down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, config: SwiGLUConfig, d_model: int, n_residuals: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * config.d_hidden, std=config.initial_std)
        self.down = Linear(
            config.d_hidden, d_model, std=config.initial_std, scale=n_residuals**-0.5
        )

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix the channels of each token."""
        return self.down(swiglu(self.gate_up(x)))


@dataclass(frozen=True)
class GELUConfig(ChannelConfig):
    """The two-layer MLP of the original Transformer, with GELU (Hendrycks and Gimpel 2016).

    Attributes:
        d_hidden: inner width.
        bias: whether its maps add vectors.
        initial_std: standard deviation of its initial weights; None scales it with the width.
    """

    kind: ClassVar[str] = "gelu"
    d_hidden: int
    bias: bool = False
    initial_std: float | None = 0.02

    def __post_init__(self) -> None:
        if self.d_hidden < 1:
            raise ValueError(f"d_hidden {self.d_hidden} is not positive; take about 4 d_model")

    def build(self, d_model: int, n_residuals: int) -> nn.Module:
        """Make the module."""
        return GELUMLP(self, d_model, n_residuals)


class GELUMLP(nn.Module):
    """y = down(gelu(up(x)))."""

    def __init__(self, config: GELUConfig, d_model: int, n_residuals: int) -> None:
        super().__init__()
        std, bias = config.initial_std, config.bias
        self.up = Linear(d_model, config.d_hidden, bias=bias, std=std)
        scale = n_residuals**-0.5
        self.down = Linear(config.d_hidden, d_model, bias=bias, std=std, scale=scale)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix the channels of each token."""
        return self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class MonarchMLPConfig(ChannelConfig):
    """M2's gated MLP of block-diagonal maps (Fu et al. 2023, section 4.2), as released by default.

    Attributes:
        d_hidden: inner width f.
        n_blocks: blocks of each factor.
        n_factors: 1 for a block-diagonal map, as released; 2 for a Monarch matrix, whose second
            factor mixes the blocks.
        interleave: whether each block of outputs holds gates as well as values. If not, the first
            half of the outputs are gates: with one factor, gates and values of a channel then read
            disjoint inputs.
    """

    kind: ClassVar[str] = "monarch_mlp"
    d_hidden: int
    n_blocks: int = 4
    n_factors: int = 1
    interleave: bool = False

    def __post_init__(self) -> None:
        if self.n_factors not in (1, 2):
            raise ValueError(f"n_factors {self.n_factors} is neither 1 nor 2; take one of them")
        for name in ("d_hidden", "n_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")

    def build(self, d_model: int, n_residuals: int) -> nn.Module:
        """Make the module.

        Raises:
            ValueError: the blocks do not divide a width.
        """
        return MonarchMLP(self, d_model, n_residuals)


class MonarchMLP(nn.Module):
    """y = down(gelu(gate(x)) * up(x)); gate and up share one map without bias, down has a bias."""

    def __init__(self, config: MonarchMLPConfig, d_model: int, n_residuals: int) -> None:
        super().__init__()
        self.config, f = config, config.d_hidden
        block_map = BlockDiagonal if config.n_factors == 1 else MonarchMap
        self.gate_up = block_map(config.n_blocks, d_model, 2 * f)
        self.down = block_map(config.n_blocks, f, d_model, bias=True, scale=n_residuals**-0.5)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Mix the channels of each token."""
        inner = self.gate_up(x)
        if self.config.interleave:
            # From (block, gate or value, channel) to (gate or value, block, channel), for `chunk`
            # below.
            inner = inner.unflatten(-1, (self.config.n_blocks, 2, -1)).transpose(-2, -3).flatten(-3)
        gate, up = inner.chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


class MonarchMap(nn.Module):
    """A rectangular Monarch matrix: two block-diagonal factors with a permutation between them.

    The inner width is the smaller of the outer two, as in the release of Dao et al. 2022.

    Args:
        blocks: blocks of each factor; they divide both widths.
        n_in: width it reads.
        n_out: width it writes.
        bias: whether a vector is added, which starts at zero.
        scale: factor on the initial weights of the second factor.
    """

    def __init__(
        self, blocks: int, n_in: int, n_out: int, *, bias: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        middle = min(n_in, n_out)
        self.first = BlockDiagonal(blocks, n_in, middle)
        self.second = BlockDiagonal(blocks, middle, n_out, scale=scale)
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Map all channels."""
        mapped = monarch_multiply(x, self.first.weight, self.second.weight)
        return mapped if self.bias is None else mapped + self.bias

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A bias of zeros."""
        assert self.bias is not None
        return torch.zeros(self.bias.shape)


def channel_kinds() -> dict[str, type[ChannelConfig]]:
    """The configuration class of every channel mixer, by kind."""
    configs = (NoChannelConfig, SwiGLUConfig, GELUConfig, MonarchMLPConfig)
    return {config.kind: config for config in configs}
