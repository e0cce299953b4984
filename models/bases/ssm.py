"""What the state-space mixers share: sizes of heads, gated norms, step biases, FLOPs of a scan."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.rowwise.rms_norm import rms_norm
from kernels.scans.ssd import CHUNK
from models.mixer import MixFlops


class GroupedNorm(nn.Module):
    """Gate, divide each group of channels by its root mean square, in float32, and scale each.

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
    """Draw what softplus makes step sizes of that are log-uniform, and 1e-4 at least."""
    share = torch.rand(count, generator=generator)
    dt = torch.exp(share * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def count_heads(width: int, head_dim: int, n_groups: int) -> int:
    """Heads that fill the inner width.

    Raises:
        ValueError: they do not, or the groups do not divide them.
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
    """Refuse ends that no positive number lies between."""
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise ValueError(f"{name} {ends} is no range; take 0 < low <= high")


def scan_flops(tokens: int, heads: int, head_dim: int, groups: int, d_state: int) -> MixFlops:
    """Count the scan by chunks of one row (Dao and Gu 2024, section 6).

    Products, 2 for each multiply-add: C B for each pair of a chunk and group, that of pairs and
    values for each pair and channel, and each channel's way into the state and out of it. A pair is
    needed where the second token is not after the first. Elementwise, for each head: 3 for a needed
    pair (a difference, its exponential, times C B) and 6 for a token (dt A, the running sum, its
    distance from the chunk's end, two exponentials, dt times one); for each channel 4 for a token
    (two scaled copies of the input; what the state gives, scaled and added); and 2 for each entry
    of the state and chunk.
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
