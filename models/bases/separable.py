"""Base of matrices computed by Mamba-2 scans, in the block of Hydra's ablation.

Source: Hwang et al. 2024, sections 3.1 and 3.2; Dao and Gu 2024, section 6, for the scan.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.precision import widened
from kernels.scans.ssd import CHUNK
from models.bases.structured_matrix import (
    Features,
    PlaceTable,
    StructuredConfig,
    StructuredMixer,
    xavier_normal,
)
from models.mixer import MixFlops, Slot
from models.sequences.whole import WholeSequence


class StateSpace(NamedTuple):
    """A state space's inputs: step sizes of each direction, and B and C, which directions share."""

    dt: Float[Tensor, "B L R H"]
    B: Float[Tensor, "B L 1 N"]
    C: Float[Tensor, "B L 1 N"]


class SeparableMixer(StructuredMixer):
    """A matrix computed by Mamba-2 scans, whose heads share B and C.

    The state has n_heads * d_qk entries, as in the release. Changed: without sequence alignment
    each position has its own step size; the release has one for all.

    Attributes:
        directions: number of scans, 1 or 2.
    """

    directions: ClassVar[int]
    remembers = False
    no_decay = frozenset({"A_log"})

    def __init__(self, config: StructuredConfig, slot: Slot, d_qk: int) -> None:
        H, R = config.n_heads, self.directions
        N, aligned = H * d_qk, config.sequence_aligned
        # B and C are convolved like the values, step sizes are not, as in Mamba-2.
        super().__init__(config, slot, convolved=2 * N * aligned, plain=R * H * aligned)
        self.d_state = N
        self.A_log = nn.Parameter(torch.empty(H))
        if aligned:
            self.dt_bias = nn.Parameter(torch.empty(H))
        else:
            self.BC = PlaceTable((config.longest, 2 * N), xavier_normal)
            self.dt = PlaceTable((config.longest, R, H), step_sizes, decayed=False)

    def recurrence(self, features: Features, sequence: WholeSequence) -> StateSpace:
        """Step sizes, B and C, from the tokens' channels or from their positions."""
        if self.config.sequence_aligned:
            BC = F.silu(features.convolved)
            steps = widened(features.plain).unflatten(2, (self.directions, -1))
            steps = steps + widened(self.dt_bias)
        else:
            places = self.places(sequence)
            BC, steps = self.BC(places), widened(self.dt(places))
        B, C = BC.unsqueeze(2).chunk(2, dim=-1)
        return StateSpace(F.softplus(steps), B, C)

    def rates(self) -> Float[Tensor, "H"]:
        """The rate A of each head, below 0."""
        return -torch.exp(widened(self.A_log))

    def scans_flops(self, tokens: int) -> MixFlops:
        """Count the scans of all directions."""
        R, H, E, N = self.directions, self.config.n_heads, self.inner_width, self.d_state
        products, chunks = chunk_flops(tokens, E, 1, N), -(-tokens // CHUNK)
        pointwise = H * (3.0 * pairs_in_chunks(tokens) + 6.0 * tokens) + E * 4.0 * tokens
        pointwise += 2.0 * N * E * chunks
        return MixFlops(R * products.needed, R * products.full_square, R * pointwise)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Rates of -1, and biases for the release's step sizes."""
        if name == "A_log":
            return torch.zeros(self.A_log.shape)
        return step_sizes(self.dt_bias.shape, generator)


def step_sizes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Biases whose softplus is log-uniform in [0.001, 0.1], one per head (the last dimension).

    All positions and directions of a head start equal, as in the release.
    """
    low, high = math.log(1e-3), math.log(0.1)
    dt = torch.exp(torch.rand(shape[-1:], generator=generator) * (high - low) + low)
    # The inverse of softplus, as in `models.bases.ssm.step_biases`.
    return (dt + torch.log(-torch.expm1(-dt))).expand(shape)


def chunk_flops(tokens: int, channels: int, groups: int, d_state: int) -> MixFlops:
    """Matrix products of one chunked scan (Dao and Gu 2024, section 6).

    Per token and channel: 2 d_state into the state and 2 d_state out of it. Per pair of tokens in a
    chunk: 2 d_state per group for C B^T, and 2 per channel.
    """
    states = 4.0 * d_state * channels * tokens
    pair, seen = 2.0 * (d_state * groups + channels), pairs_in_chunks(tokens)
    # A full square of pairs per chunk is twice the causal ones less the diagonal, one per token.
    return MixFlops(states + pair * seen, states + pair * (2 * seen - tokens))


def pairs_in_chunks(tokens: int) -> float:
    """Pairs of tokens in the same chunk, ordered causally."""
    whole, rest = divmod(tokens, CHUNK)
    return (whole * CHUNK**2 + rest**2 + tokens) / 2
