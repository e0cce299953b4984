"""Softmax attention with rotary positions, QK-norm and grouped keys (Vaswani 2017; Touvron 2023).

QK-norm is a per-head RMSNorm of queries and keys before the rotation (Wortsman et al. 2023).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.layers import Linear, RMSNorm, Rotation, rotate, rotation
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, register
from models.sequence import WholeSequence


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Heads and positions of an attention.

    Attributes:
        n_heads: query heads; head_dim is d_model / n_heads and even.
        n_kv_heads: key and value heads, a divisor of n_heads; None for as many as n_heads.
        rope_theta: base of the rotary frequencies.
        qk_norm: whether queries and keys are normalised.
        initial_std: standard deviation of initial weights; None scales it with the width.
    """

    kind: ClassVar[str] = "attention"
    n_heads: int
    n_kv_heads: int | None = None
    rope_theta: float = 1e4
    qk_norm: bool = True
    initial_std: float | None = 0.02

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads {self.kv_heads} does not divide n_heads {self.n_heads}; "
                "choose a divisor"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads or self.n_heads

    def head_dim(self, d_model: int) -> int:
        """Width of a head.

        Raises:
            ValueError: the heads do not divide d_model into even widths.
        """
        if d_model % (2 * self.n_heads):
            fitting = [n for n in range(1, d_model // 2 + 1) if d_model % (2 * n) == 0]
            raise ValueError(
                f"mixer.n_heads {self.n_heads} does not divide d_model {d_model} into heads of "
                f"even width; choose from {', '.join(map(str, fitting))}"
            )
        return d_model // self.n_heads


class Coefficients(NamedTuple):
    """Queries and keys, which decide how values are mixed."""

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B S G P"]
    visible: Bool[Tensor, "B 1 L S"] | None


@register(AttentionConfig)
class Attention(Mixer):
    """M = softmax(queries keys^T / sqrt(P)) over the visible keys."""

    patterns = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: AttentionConfig, d_model: int, n_residuals: int) -> None:
        super().__init__()
        self.config = config
        P = self.head_dim = config.head_dim(d_model)
        H, G = config.n_heads, config.kv_heads
        self.qkv = Linear(d_model, (H + 2 * G) * P, std=config.initial_std)
        self.out = Linear(H * P, d_model, std=config.initial_std, scale=n_residuals**-0.5)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(P), RMSNorm(P)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence
    ) -> tuple[Float[Tensor, "B S G P"], Coefficients]:
        """Values are the value heads; queries and keys decide."""
        B, L, _ = x.shape
        H, G, P = self.config.n_heads, self.config.kv_heads, self.head_dim
        heads = self.qkv(x).view(B, L, H + 2 * G, P)
        queries, keys, values = heads.split([H, G, G], dim=2)
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        turn = self._rotation(sequence)
        keys = sequence.gather(rotate(keys, turn))
        visible = sequence.visible() if sequence.packed or keys.shape[1] > L else None
        return sequence.gather(values), Coefficients(rotate(queries, turn), keys, visible)

    def mix(
        self,
        values: Float[Tensor, "B S G P"],
        coefficients: Coefficients,
        sequence: WholeSequence,  # noqa: ARG002
    ) -> Float[Tensor, "B L H P"]:
        """Attend; torch's fused kernel keeps the statistics in float32."""
        queries, keys, visible = coefficients
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2).to(queries.dtype),
            values.transpose(1, 2).to(queries.dtype),
            attn_mask=visible,
            is_causal=visible is None,
            enable_gqa=self.config.kv_heads != self.config.n_heads,
        )
        return mixed.transpose(1, 2)

    def merge(
        self,
        mixed: Float[Tensor, "B L H P"],
        coefficients: Coefficients,  # noqa: ARG002
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        return self.out(mixed.flatten(2))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Two products of head_dim for each visible pair (Transformer card, D.3)."""
        each = 4.0 * self.config.n_heads * self.head_dim
        visible = queries * (keys - queries) + queries * (queries + 1) / 2
        return MixFlops(needed=each * visible, full_square=each * queries * keys)

    def _rotation(self, sequence: WholeSequence) -> Rotation:
        theta, P = self.config.rope_theta, self.head_dim
        made = sequence.memo(
            ("rotation", P, theta),
            lambda: torch.stack(rotation(sequence.positions(), P, theta)),
        )
        return Rotation(made[0], made[1])
