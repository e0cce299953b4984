"""A matrix of free parameters, as in MLP-Mixer (Tolstikhin et al. 2021; Hydra paper, table 1).

Changed: masked to its lower triangle in a causal pattern.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.bases.structured_matrix import (
    EntrywiseMixer,
    Features,
    Structure,
    UnalignedConfig,
    xavier_normal,
)
from models.mixer import MixFlops, Pattern, Slot, register
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class DenseConfig(UnalignedConfig):
    """A dense matrix."""

    kind: ClassVar[str] = "dense"


@register(DenseConfig)
class Dense(EntrywiseMixer):
    """m[i, j] is a parameter of its own; no algorithm is faster than quadratic."""

    patterns = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
    sharded = frozenset({Pattern.CAUSAL_SELF})

    def __init__(self, config: DenseConfig, slot: Slot) -> None:
        super().__init__(config, slot, gain=1.0)
        self.weight = nn.Parameter(torch.empty(config.n_heads, config.max_len, config.max_len))

    def structure(self, features: Features, sequence: WholeSequence) -> Structure:
        """Nothing but the parameters."""
        del features, sequence

    def entries(self, structure: Structure, sequence: WholeSequence) -> Float[Tensor, "#B H L S"]:
        """The parameter of each pair of positions."""
        del structure
        rows, columns = sequence.documents.shape[1], sequence.gathered_documents().shape[1]
        if not sequence.packed:
            return self.weight[None, :, columns - rows : columns, :columns]
        own, other = self.places(sequence), self.key_places(sequence)
        return self.weight[:, own[:, :, None], other[:, None, :]].transpose(0, 1)

    def entry_flops(self, queries: int, keys: int) -> MixFlops:
        """None."""
        del queries, keys
        return MixFlops()

    def draw(self, name: str, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Initial parameters, as the release draws them."""
        return xavier_normal(self.weight.shape, generator)
