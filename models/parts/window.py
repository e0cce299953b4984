"""Sliding-window attention on whole, continued and sharded sequences."""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.attention.window_attention import window_attention
from models.sequences.whole import WholeSequence


def attend_window(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B L G P"],
    values: Float[Tensor, "B L G Q"],
    window: int,
    sequence: WholeSequence,
) -> Float[Tensor, "B L H Q"]:
    """Attend to the last `window` tokens of the document, earlier chunks and shards included."""
    before = sequence.halo(keys, window - 1)
    values_before = sequence.halo(values, window - 1)
    documents = sequence.packed_documents
    if before is not None and values_before is not None:
        ids = sequence.halo_documents(window - 1)
        assert ids is not None, "a halo comes with its documents"
        keys, values = torch.cat([before, keys], dim=1), torch.cat([values_before, values], dim=1)
        documents = torch.cat([ids, sequence.documents], dim=1)
    return window_attention(queries, keys, values, window, documents)
