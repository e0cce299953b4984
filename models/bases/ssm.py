"""What state-space mixers share: head sizes, the gated norm, step size biases, FLOPs of a scan."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.rowwise.rms_norm import rms_norm
from kernels.scans.ssd import CHUNK
from models.mixer import MixFlops


class GroupedNorm(nn.Module):
    """RMS norm of x silu(gate) over groups of channels, in float32 (Dao and Gu 2024, section 7.1).

    Args:
        width: channels.
        groups: groups of channels; they divide the width.
        eps: added to mean squares.
    """

    def __init__(self, width: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self._groups, self._eps = groups, eps

    def forward(
        self, x: Float[Tensor, "*batch E"], gate: Float[Tensor, "*batch E"]
    ) -> Float[Tensor, "*batch E"]:
        """Normalise the last dimension of x silu(gate)."""
        return rms_norm(x, self.weight, self._eps, self._groups, gate)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Ones."""
        return torch.ones(self.weight.shape)


def step_biases(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Biases whose softplus is log-uniform in [low, high], but at least 1e-4."""
    share = torch.rand(count, generator=generator)
    dt = torch.exp(share * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=1e-4)
    # The inverse of softplus, log(exp(dt) - 1), in a form that keeps the digits of a small dt.
    return dt + torch.log(-torch.expm1(-dt))


def count_heads(width: int, head_dim: int, n_groups: int) -> int:
    """Number of heads of width `head_dim` in the inner width.

    Raises:
        ValueError: head_dim does not divide the width, or n_groups the number of heads.
    """
    heads = width // head_dim
    if width % head_dim:
        raise ValueError(
            f"mixer.head_dim {head_dim} does not divide the inner width {width}, which is expand "
            f"times d_model; choose from {_divisors(width)}"
        )
    if heads % n_groups:
        raise ValueError(
            f"mixer.n_groups {n_groups} does not divide the {heads} heads; "
            f"choose from {_divisors(heads)}"
        )
    return heads


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def require_positive(name: str, value: int) -> None:
    """Refuse sizes below 1."""
    if value < 1:
        raise ValueError(f"{name} {value} is not positive; take 1 or more")


def require_range(name: str, ends: tuple[float, ...]) -> None:
    """Refuse what is not a range of positive numbers."""
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise ValueError(f"{name} {ends} is not a range; take 0 < low <= high")


def scan_flops(tokens: int, heads: int, head_dim: int, groups: int, d_state: int) -> MixFlops:
    """FLOPs of the chunked scan of one row (Dao and Gu 2024, section 6).

    Products, a multiply-add counted as 2: C B^T per pair in a chunk and group; its product with the
    values per pair and channel; into the state and out of it per token and channel. A pair counts
    as needed if it is causal. Elementwise, per head: 3 per needed pair (difference, exp, times C
    B^T) and 6 per token (dt A, its running sum, distance from the chunk's end, two exps, dt times
    one of them); per channel and token 4 (two scaled inputs, and scaling and adding what the state
    gives); 2 per state entry and chunk.
    """
    channels = heads * head_dim
    whole, rest = divmod(tokens, CHUNK)
    square = whole * CHUNK**2 + rest**2
    pairs, chunks = (square + tokens) / 2, whole + (rest > 0)
    pair, states = 2.0 * (groups * d_state + channels), 4.0 * d_state * channels * tokens
    pointwise = heads * (3.0 * pairs + 6.0 * tokens) + channels * 4.0 * tokens
    return MixFlops(
        needed=states + pair * pairs,
        full_square=states + pair * square,
        elementwise=pointwise + 2.0 * d_state * channels * chunks,
    )
