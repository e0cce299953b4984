"""Base of mixers with rotary grouped-query heads, whose weights load from those of `attention`."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from models.bases.heads import HeadsConfig, Projected, head_width
from models.mixer import Coefficients, Mixer, Slot
from models.parts.layers import Linear, RMSNorm
from models.parts.rotary import Rotation, rotation_of
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class GroupedHeadsConfig(HeadsConfig):
    """Heads and positions of an attention.

    Attributes:
        n_kv_heads: key and value heads, a divisor of n_heads; None for as many as n_heads.
        rope_theta: base of the rotary frequencies.
    """

    n_kv_heads: int | None = None
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads {self.kv_heads} does not divide n_heads {self.n_heads}; "
                "choose a divisor"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads


class GroupedHeads(Mixer):
    """A mixer with grouped queries, keys and values; parameters are named as in `attention`."""

    def __init__(self, config: GroupedHeadsConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.n_heads, self.n_kv_heads = config.n_heads, config.kv_heads
        P = self.head_dim = head_width(slot.d_model, config.n_heads)
        self.rope_theta, std = config.rope_theta, config.initial_std
        self.qkv = Linear(slot.d_model, (self.n_heads + 2 * self.n_kv_heads) * P, std=std)
        self.out = Linear(self.n_heads * P, slot.d_model, std=std, scale=slot.residual_scale)
        self.normalised = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(P), RMSNorm(P)

    def heads(self, x: Float[Tensor, "B L D"]) -> Projected:
        """Queries and keys, normalised and scaled but not yet rotated, and values."""
        P, (H, G) = self.head_dim, (self.n_heads, self.n_kv_heads)
        parts = self.qkv.in_parts(x, [H * P, G * P, G * P])
        queries, keys, values = (part.unflatten(2, (-1, P)) for part in parts)
        if self.normalised:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return Projected(self.slot.scaled(queries), keys, values)

    def rotation(self, sequence: WholeSequence) -> Rotation:
        """The rotation of queries and keys by their positions."""
        return rotation_of(sequence, self.head_dim, self.rope_theta)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.out(mixed.flatten(2))
