"""A semiseparable matrix: Mamba-2's state space in the ablation's block (Hydra paper, section 3.1).

m[i, j] = c[i] . a[i] ... a[j+1] b[j] for i >= j, where a = exp(-dt exp(A_log[h])) in head h and b
includes dt: every block on or below the diagonal has rank at most the state size. The paper's
ablation is bidirectional and does not include it; block, sizes and initial values are those of its
quasiseparable matrix, plus the identity as for its other matrices.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.bases.separable import SeparableMixer, StateSpace
from models.bases.structured_matrix import Features, StructuredConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.recurrence import Ssd
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class SemiseparableConfig(StructuredConfig):
    """Sizes of a semiseparable matrix.

    Attributes:
        d_qk: size of the state over n_heads.
    """

    kind: ClassVar[str] = "semiseparable"
    d_qk: int = 16


@register(SemiseparableConfig)
class Semiseparable(SeparableMixer):
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] b[t] x[t], y[t] = c[t] . h[t]."""

    patterns = frozenset({Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})
    constant_state = True
    directions = 1

    def __init__(self, config: SemiseparableConfig, slot: Slot) -> None:
        super().__init__(config, slot, config.d_qk)

    def structure(self, features: Features, sequence: WholeSequence) -> StateSpace:
        """Step sizes, B and C."""
        return self.recurrence(features, sequence)

    def multiply(
        self, values: Float[Tensor, "B L H P"], structure: StateSpace, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Scan."""
        dt, B, C = structure
        documents = sequence.packed_documents
        return sequence.recur(Ssd(values, dt[:, :, 0], self.rates(), B, C, documents))

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """See `scans_flops`."""
        return self.scans_flops(queries)
