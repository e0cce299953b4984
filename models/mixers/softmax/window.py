"""Sliding-window attention (Beltagy et al. 2020, "Longformer", section 3.1).

A window of W is W keys, the query's own included; published implementations differ by one. The
bidirectional form is CAB's local attention (Zhang et al. 2023), with W - 1 keys on either side.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from kernels.attention.window_attention import centred_window_attention
from models.bases.grouped_heads import GroupedHeads, GroupedHeadsConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.parts.rotary import rotate
from models.parts.window import attend_window
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class WindowConfig(GroupedHeadsConfig):
    """Heads of a window attention; parameters are those of `attention`.

    Attributes:
        window: keys that a query sees in each direction, its own included.
    """

    kind: ClassVar[str] = "window"
    window: int = field(kw_only=True)
    qk_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window {self.window} is empty; take 1 or more")


class Coefficients(NamedTuple):
    """Queries and keys, which determine the mixing matrix."""

    queries: Float[Tensor, "B L H P"]
    keys: Float[Tensor, "B L G P"]


@register(WindowConfig)
class WindowAttention(GroupedHeads):
    """M = softmax(queries keys^T / sqrt(P)) over the keys in the window."""

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True

    def __init__(self, config: WindowConfig, slot: Slot) -> None:
        super().__init__(config, slot)
        self.config = config

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L G P"], Coefficients]:
        """Values are the value heads; queries and keys determine the matrix."""
        del memory
        queries, keys, values = self.heads(x)
        by = self.rotation(sequence)
        return values, Coefficients(rotate(queries, by), rotate(keys, by))

    def mix(
        self, values: Float[Tensor, "B L G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Attend to the window; its keys and values are the decoding state."""
        queries, keys = coefficients
        if self.slot.causal:
            return attend_window(queries, keys, values, self.config.window, sequence)
        documents = sequence.packed_documents
        return centred_window_attention(queries, keys, values, self.config.window, documents)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Two products of head_dim per visible pair (Transformer card, D.3).

        The full square counts a whole window for every query.
        """
        each, W = 4.0 * self.n_heads * self.head_dim, self.config.window
        pairs, width = _pairs_before(keys, W) - _pairs_before(keys - queries, W), W
        if not self.slot.causal:
            # As many later keys as earlier ones, with the own key counted once.
            pairs, width = 2 * pairs - queries, 2 * W - 1
        return MixFlops(needed=each * pairs, full_square=each * queries * min(width, keys))


def _pairs_before(tokens: int, window: int) -> int:
    """Visible pairs of the first tokens: token i sees i + 1 keys until the window is full."""
    growing = min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * window
