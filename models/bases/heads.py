"""Multi-head queries, keys and values for the efficient attentions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.mixer import MixerConfig, Slot
from models.parts.layers import Linear, RMSNorm
from models.parts.rotary import rotate, rotation_of
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class HeadsConfig(MixerConfig):
    """Heads of a mixer with queries, keys and values.

    Attributes:
        n_heads: heads; head_dim is d_model / n_heads and even.
        qk_norm: whether queries and keys are normalised.
        initial_std: standard deviation of initial weights; None scales it with the width.
    """

    n_heads: int
    qk_norm: bool = False
    initial_std: float | None = 0.02


def head_width(d_model: int, n_heads: int) -> int:
    """Width of each of the heads that d_model is split into; even, so that rotary pairs fit.

    Raises:
        ValueError: the heads do not divide d_model into even widths.
    """
    if n_heads < 1 or d_model % (2 * n_heads):
        fitting = [n for n in range(1, d_model // 2 + 1) if d_model % (2 * n) == 0]
        raise ValueError(
            f"mixer.n_heads {n_heads} does not divide d_model {d_model} into heads of even "
            f"width; choose from {', '.join(map(str, fitting))}"
        )
    return d_model // n_heads


class Projected(NamedTuple):
    """Queries of the tokens; keys and values of the tokens, or of a memory."""

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B S H P"]
    values: Float[Tensor, "B S H P"]


class Heads(nn.Module):
    """Projections to queries, keys and values, and the output projection, without bias."""

    def __init__(self, config: HeadsConfig, slot: Slot) -> None:
        super().__init__()
        D, std = slot.d_model, config.initial_std
        self._slot = slot
        self.n_heads, self.head_dim = config.n_heads, head_width(D, config.n_heads)
        self.qkv = Linear(D, 3 * D, std=std)
        self.out = Linear(D, D, std=std, scale=slot.residual_scale)
        self.normalised = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Projected:
        """Project tokens for a self pattern."""
        parts = self.qkv.in_parts(x, 3 * [x.shape[2]])
        return self._normalise(*(part.unflatten(2, (self.n_heads, -1)) for part in parts))

    def across(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory
    ) -> Projected:
        """Project tokens and a memory for a cross pattern; the memory is projected once."""
        H, P = self.n_heads, self.head_dim
        to_queries, to_pairs = self.qkv.weight.split([H * P, 2 * H * P])
        seen = memory.sequence.without_padding(memory.x)
        # Keys and values in one tensor, so that the decoding state stores one.
        pairs = sequence.once(lambda: F.linear(seen, to_pairs).unflatten(2, (2 * H, P)))
        queries = F.linear(x, to_queries).unflatten(2, (H, P))
        return self._normalise(queries, *pairs.split(H, dim=2))

    def merge(self, mixed: Float[Tensor, "B L H P"]) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        return self.out(mixed.flatten(2))

    def _normalise(self, queries: Tensor, keys: Tensor, values: Tensor) -> Projected:
        if self.normalised:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return Projected(self._slot.scaled(queries), keys, values)


def rotated(projected: Projected, sequence: WholeSequence, theta: float) -> Projected:
    """Rotate queries and keys of the same sequence by their positions."""
    by = rotation_of(sequence, projected.queries.shape[-1], theta)
    return projected._replace(
        queries=rotate(projected.queries, by), keys=rotate(projected.keys, by)
    )
