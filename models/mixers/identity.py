"""The identity mixer, a baseline without any interaction between tokens."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.mixer import Coefficients, Mixer, MixerConfig, MixFlops, Pattern, Slot, register
from models.parts.layers import Linear
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class IdentityConfig(MixerConfig):
    """A mixer whose matrix is the identity."""

    kind: ClassVar[str] = "identity"


@register(IdentityConfig)
class Identity(Mixer):
    """M = 1, between the input and output maps that every mixer has."""

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF})
    sharded = patterns
    traced = True

    def __init__(self, config: IdentityConfig, slot: Slot) -> None:
        super().__init__(slot)
        self.config = config
        self.into = Linear(slot.d_model, slot.d_model)
        self.out = Linear(slot.d_model, slot.d_model, scale=slot.residual_scale)

    def project(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> tuple[Float[Tensor, "B L 1 D"], Coefficients]:
        """Values are a dense map of the tokens."""
        del sequence, memory
        return self.into(x).unsqueeze(2), None

    def mix(
        self,
        values: Float[Tensor, "B L 1 P"],
        coefficients: Coefficients,
        sequence: WholeSequence,
    ) -> Float[Tensor, "B L 1 P"]:
        """Return the values."""
        del coefficients, sequence
        return values

    def merge(
        self, mixed: Float[Tensor, "B L 1 P"], coefficients: Coefficients
    ) -> Float[Tensor, "B L D"]:
        """Project out."""
        del coefficients
        return self.out(mixed.squeeze(2))

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """None."""
        del queries, keys
        return MixFlops()
