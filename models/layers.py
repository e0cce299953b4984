"""Layers that two mixers or more use, each of which knows its own initial values."""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.causal_conv import causal_conv
from models.sequence import WholeSequence


@runtime_checkable
class Drawn(Protocol):
    """A module that knows the initial values of the parameters it holds itself."""

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values of a parameter."""
        ...


class Linear(nn.Linear):
    """A dense map of each token, without bias.

    Args:
        n_in: width it reads.
        n_out: width it writes.
        std: standard deviation of its initial weights; None draws U(-1/sqrt(n_in), 1/sqrt(n_in)),
            torch's default, which has the standard deviation 0.58/sqrt(n_in).
        scale: factor on the initial weights; 1/sqrt(residual branches) for maps that write to the
            residual stream (Radford et al. 2019, section 2.3).
    """

    def __init__(
        self, n_in: int, n_out: int, *, std: float | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(n_in, n_out, bias=False)
        self._std, self._scale = std, scale

    def reset_parameters(self) -> None:
        """Leave the weights alone; the backbone draws them."""

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial weights."""
        if self._std is None:
            return uniform(self.weight.shape, self.in_features**-0.5, generator) * self._scale
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
    """Divide each token by its root mean square, in float32, and scale it (Zhang 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._eps = eps

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self._eps).to(x.dtype)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Ones."""
        return torch.ones(self.weight.shape)


class ShortConv(nn.Module):
    """A causal depthwise convolution over the last few tokens of each document."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Float[Tensor, "B L E"], sequence: WholeSequence) -> Float[Tensor, "B L E"]:
        """Convolve each channel."""
        documents = sequence.documents if sequence.packed else None
        initial = sequence.halo(x, self.weight.shape[1] - 1)
        return causal_conv(x, self.weight, self.bias, initial, documents).outputs

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Initial values as torch draws those of a Conv1d: U(-1/sqrt(width), 1/sqrt(width))."""
        shape = getattr(self, name).shape
        return uniform(shape, self.weight.shape[1] ** -0.5, generator)


class Rotation(NamedTuple):
    """Cosines and sines that `rotate` multiplies by, one head's width each."""

    cos: Float[Tensor, "B L 1 P"]
    sin: Float[Tensor, "B L 1 P"]


def rotation(positions: Int[Tensor, "B L"], head_dim: int, theta: float) -> Rotation:
    """The angles of rotary embeddings, in float32 (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(exponents * (-math.log(theta) / head_dim))
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "B L H P"], by: Rotation) -> Float[Tensor, "B L H P"]:
    """Turn each pair of channels (p, p + P/2) by its angle."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x * by.cos + turned * by.sin).to(x.dtype)


def uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    """Draw from U(-bound, bound)."""
    return torch.rand(shape, generator=generator) * (2 * bound) - bound
