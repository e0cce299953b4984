"""A quasiseparable matrix: Hydra's core in its ablation's block (Hydra paper, sections 3.2, 4.1).

m[i, j] = c[i-1] . a[i-1] ... a[j+1] b[j] below the diagonal, c[i+1] . a'[i+1] ... a'[j-1] b[j]
above it, delta[i] on it: every off-diagonal block has rank at most the state size, and the diagonal
is free. As in the release's ablation, the directions share B and C but not the step sizes. Changed:
without sequence alignment the diagonal is learned per position too; the release computes it from
the tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kernels.precision import widened
from kernels.scans.ssd import ssd
from models.bases.separable import SeparableMixer, StateSpace
from models.bases.structured_matrix import Features, PlaceTable, StructuredConfig
from models.mixer import MixFlops, Pattern, Slot, register
from models.parts.layers import Linear
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class QuasiseparableConfig(StructuredConfig):
    """Sizes of a quasiseparable matrix.

    Attributes:
        d_qk: size of the state over n_heads.
    """

    kind: ClassVar[str] = "quasiseparable"
    d_qk: int = 16


class Structure(NamedTuple):
    """What determines both triangles, and the diagonal between them."""

    triangles: StateSpace
    diagonal: Float[Tensor, "B L H"]


@register(QuasiseparableConfig)
class Quasiseparable(SeparableMixer):
    """The sum of a shifted forward scan, a shifted backward scan and a diagonal."""

    patterns = frozenset({Pattern.NONCAUSAL_SELF})
    residual = False
    directions = 2

    def __init__(self, config: QuasiseparableConfig, slot: Slot) -> None:
        super().__init__(config, slot, config.d_qk)
        H = config.n_heads
        if config.sequence_aligned:
            self.D = nn.Parameter(torch.empty(H))
            self.fc_D = Linear(self.inner_width, H)
        else:
            self.delta = PlaceTable((config.longest, H), _ones, decayed=False)

    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Step sizes, B and C, and the diagonal, which is computed from the values."""
        if self.config.sequence_aligned:
            diagonal = widened(self.fc_D(features.values)) + widened(self.D)
        else:
            diagonal = self.delta(self.places(sequence))
        return Structure(self.recurrence(features, sequence), diagonal)

    def multiply(
        self, values: Float[Tensor, "B L H P"], structure: Structure, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Scan in both directions at once, the backward one as additional rows."""
        (dt, B, C), diagonal = structure
        forward, backward = dt.unbind(2)
        steps = torch.cat([forward, backward.flip(1)])
        # The backward scan is a forward scan of the reversed sequence.
        x, B, C = (torch.cat([tensor, tensor.flip(1)]) for tensor in (values, B, C))
        documents = None
        if sequence.packed:
            documents = sequence.memo(
                ("structured", "both directions"), lambda: _both_directions(sequence.documents)
            )
        scanned = ssd(x, steps, self.rates(), B, C, None, documents).outputs
        before, after = _delayed(scanned, documents).chunk(2)
        return before + after.flip(1) + diagonal[..., None] * values

    def multiply_flops(self, queries: int, keys: int) -> MixFlops:  # noqa: ARG002
        """See `scans_flops`; 3 more per channel: the diagonal and two sums."""
        scans = self.scans_flops(queries)
        pointwise = scans.elementwise + 3.0 * self.inner_width * queries
        return MixFlops(scans.needed, scans.full_square, pointwise)

    def draw(self, name: str, generator: torch.Generator) -> Tensor:
        """Ones on the diagonal."""
        return torch.ones(self.D.shape) if name == "D" else super().draw(name, generator)


def _ones(shape: torch.Size, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return torch.ones(shape)


def _both_directions(documents: Int[Tensor, "B L"]) -> Int[Tensor, "C L"]:
    """Number the documents, padding included, from the front and from the back."""
    rows = torch.cat([documents, documents.flip(1)])
    changes = rows[:, 1:] != rows[:, :-1]
    return torch.cat([torch.zeros_like(rows[:, :1]), changes.cumsum(1).to(rows.dtype)], dim=1)


def _delayed(x: Float[Tensor, "C L H P"], documents: Int[Tensor, "C L"] | None) -> Tensor:
    """Shift features by one token within documents; a document's first token gets zeros."""
    earlier = x[:, :-1]
    if documents is not None:
        first = documents[:, 1:] != documents[:, :-1]
        earlier = earlier.masked_fill(first[:, :, None, None], 0.0)
    return torch.cat([torch.zeros_like(x[:, :1]), earlier], dim=1)
