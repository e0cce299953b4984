"""Layers that several mixers use; each defines its own initial values."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.rowwise.rms_norm import rms_norm, rotated_rms_norm
from models.mup import FanIn
from models.parts.linear_in_parts import linear_in_parts
from models.parts.rotary import Rotation


@runtime_checkable
class Drawn(Protocol):
    """A module that defines the initial values of its own parameters, not of its submodules'."""

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values of a parameter."""
        ...


class Linear(nn.Linear):
    """A dense map of each token.

    Args:
        n_in: input width.
        n_out: output width.
        bias: whether to add a bias, which starts at zero.
        std: standard deviation of its initial weights; None draws U(-1/sqrt(n_in), 1/sqrt(n_in)),
            torch's default, which has the standard deviation 0.58/sqrt(n_in).
        scale: factor on the initial weights; 1/sqrt(residual branches) for maps that write to the
            residual stream (Radford et al. 2019, section 2.3).
        fan_in: what its input width grows with; None for a constant one.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool = False,
        std: float | None = None,
        scale: float = 1.0,
        fan_in: FanIn | None = FanIn.WIDTH,
    ) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self._std, self._scale = std, scale
        self.fan_in = {} if fan_in is None else {"weight": fan_in}

    def in_parts(
        self, x: Float[Tensor, "*batch I"], sizes: Sequence[int]
    ) -> tuple[Float[Tensor, "*batch O_i"], ...]:
        """Map, and split the output channels into parts of the given sizes."""
        return linear_in_parts(x, self.weight, self.bias, sizes)

    def token_flops(self) -> int:
        """Forward FLOPs for each token."""
        return 2 * self.weight.numel()

    def reset_parameters(self) -> None:
        """Leave the weights alone; the backbone draws them."""

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial weights, and a bias of zeros."""
        if name == "bias":
            return torch.zeros(self.bias.shape)
        if self._std is None:
            return uniform(self.weight.shape, self.in_features**-0.5, generator) * self._scale
        return torch.randn(self.weight.shape, generator=generator) * (self._std * self._scale)


class BlockDiagonal(nn.Module):
    """A block-diagonal map of each token.

    Args:
        blocks: number of blocks; divides both widths.
        n_in: input width.
        n_out: output width.
        bias: whether to add a bias, which starts at zero.
        std: standard deviation of its initial weights; None draws U(-1/sqrt(n), 1/sqrt(n)) with n
            the inputs of a block.
        scale: factor on the initial weights, as that of `Linear`.

    Raises:
        ValueError: the blocks do not divide a width.
    """

    def __init__(
        self,
        blocks: int,
        n_in: int,
        n_out: int,
        *,
        bias: bool = False,
        std: float | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        for width in (n_in, n_out):
            if width % blocks:
                raise ValueError(f"{blocks} blocks do not divide a width of {width}")
        self.weight = nn.Parameter(torch.empty(blocks, n_out // blocks, n_in // blocks))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self._std, self._scale = std, scale
        self.fan_in = {"weight": FanIn.WIDTH}

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        """Map each block of channels."""
        blocks = self.weight.shape[0]
        pieces = x.unflatten(-1, (blocks, -1))
        # A batched product over blocks: a broadcast matmul would copy the weights for each token.
        mapped = torch.einsum("...bi,boi->...bo", pieces, self.weight).flatten(-2)
        return mapped if self.bias is None else mapped + self.bias

    def token_flops(self) -> int:
        """Forward FLOPs for each token."""
        return 2 * self.weight.numel()

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial weights, and a bias of zeros."""
        if name == "bias":
            assert self.bias is not None
            return torch.zeros(self.bias.shape)
        if self._std is None:
            bound = self.weight.shape[2] ** -0.5
            return uniform(self.weight.shape, bound, generator) * self._scale
        return torch.randn(self.weight.shape, generator=generator) * (self._std * self._scale)


class Embedding(nn.Embedding):
    """A vector for each token id, drawn from N(0, std^2)."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__(rows, width)
        self._std = std

    def reset_parameters(self) -> None:
        """Leave the weights alone; the backbone draws them."""

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial vectors."""
        return torch.randn(self.weight.shape, generator=generator) * self._std


class RMSNorm(nn.Module):
    """RMS norm of each token, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self._eps)

    def rotated(self, x: Float[Tensor, "B L H P"], by: Rotation) -> Float[Tensor, "B L H P"]:
        """Normalise each head, and rotate it."""
        return rotated_rms_norm(x, self.weight, self._eps, by.cos, by.sin)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Ones."""
        return torch.ones(self.weight.shape)


def uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    """Draw from U(-bound, bound)."""
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
