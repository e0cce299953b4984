"""Softmax attention (Vaswani et al. 2017) with rotary embeddings, QK-norm and grouped queries.

QK-norm is a per-head RMS norm of queries and keys before the rotation (Wortsman et al. 2023).
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kernels.attention.packed_attention import packed_attention, serves_one_document
from kernels.attention.window_attention import window_attention
from models.bases.heads import head_width
from models.mixer import Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear, RMSNorm
from models.parts.rotary import rotate, rotation_of
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence, visible_memory


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


class Coefficients(NamedTuple):
    """Queries and keys, which determine the mixing matrix.

    Attributes:
        visible: mask of a memory that holds several documents; None otherwise.
    """

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B S G P"]
    visible: Bool[Tensor, "B 1 L S"] | None


@register(AttentionConfig)
class Attention(Mixer):
    """M = softmax(queries keys^T / sqrt(P)) over the visible keys.

    In a cross pattern keys and values come from the memory. Distances between its tokens and the
    queries have no meaning, so nothing is rotated.
    """

    patterns = frozenset(Pattern)
    sharded = frozenset({Pattern.CAUSAL_SELF})
    traced = True

    def __init__(self, config: AttentionConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config, d_model = config, slot.d_model
        P = self.head_dim = head_width(d_model, config.n_heads)
        H, G = config.n_heads, config.kv_heads
        std, scale = config.initial_std, slot.residual_scale
        self.qkv = Linear(d_model, (H + 2 * G) * P, std=std)
        self.out = Linear(H * P, d_model, std=std, scale=scale)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(P), RMSNorm(P)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B S G P"], Coefficients]:
        """Values are the value heads; queries and keys determine the matrix."""
        if memory is not None:
            return self._project_cross(x, sequence, memory)
        H, G = self.config.n_heads, self.config.kv_heads
        P = self.head_dim
        parts = self.qkv.in_parts(x, [H * P, G * P, G * P])
        queries, keys, values = (part.unflatten(2, (-1, P)) for part in parts)
        by = rotation_of(sequence, P, self.config.rope_theta)
        if self.config.qk_norm:
            queries, keys = self.q_norm.rotated(queries, by), self.k_norm.rotated(keys, by)
        else:
            queries, keys = rotate(queries, by), rotate(keys, by)
        queries = self.slot.scaled(queries)
        return sequence.gather(values), Coefficients(queries, sequence.gather(keys), None)

    def mix(
        self, values: Float[Tensor, "B S G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Attend, by the fastest kernel; all of them keep softmax statistics in float32."""
        queries, keys, visible = coefficients
        # In a later chunk queries are the last of the keys, which torch's causal mask does not
        # support.
        packed = sequence.packed or keys.shape[1] > queries.shape[1]
        if packed and self.slot.pattern in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF):
            documents = sequence.gathered_documents()
            # The stub of torch.compiler.disable loses the function's signature.
            return packed_attention(
                queries,
                keys,  # pyright: ignore[reportCallIssue]
                values,
                documents,
                causal=self.slot.causal,
            )
        causal = visible is None and self.slot.pattern is Pattern.CAUSAL_SELF
        if causal and serves_one_document(queries, keys):
            return window_attention(queries, keys, values, keys.shape[1])
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2).to(queries.dtype),
            values.transpose(1, 2).to(queries.dtype),
            attn_mask=visible,
            is_causal=causal,
            enable_gqa=self.config.kv_heads != self.config.n_heads,
        )
        return mixed.transpose(1, 2)

    def merge(
        self, mixed: Float[Tensor, "B L H P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Mix the heads."""
        del coefficients
        return self.out(mixed.flatten(2))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Two products of head_dim for each visible pair (Transformer card, D.3)."""
        each = 4.0 * self.config.n_heads * self.head_dim
        visible: float = queries * keys
        if self.slot.pattern is Pattern.CAUSAL_SELF:
            visible = queries * (keys - queries) + queries * (queries + 1) / 2
        return MixFlops(needed=each * visible, full_square=each * queries * keys)

    def _project_cross(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory
    ) -> tuple[Float[Tensor, "B S G P"], Coefficients]:
        H, G, P = self.config.n_heads, self.config.kv_heads, self.head_dim
        to_queries, to_pairs = self.qkv.weight.split([H * P, 2 * G * P])
        queries = F.linear(x, to_queries).unflatten(2, (H, P))
        seen = memory.sequence.without_padding(memory.x)
        pairs = sequence.once(lambda: F.linear(seen, to_pairs).unflatten(2, (2 * G, P)))
        keys, values = pairs.split(G, dim=2)
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        own, other = sequence.own_documents(), memory.sequence.own_documents()
        masked = sequence.packed or memory.sequence.packed
        visible = visible_memory(own, other) if masked else None
        return values, Coefficients(self.slot.scaled(queries), keys, visible)
