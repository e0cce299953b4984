"""Bidirectional SSD: the off-diagonal part of Hydra's quasiseparable matrix.

Source: Hwang et al. 2024, "Hydra", section 3.2. Changed: resets at document boundaries, also in the
shifts.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.scans.not_finite import filled_where
from kernels.scans.ssd import ssd


def bidirectional_ssd(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L 2 H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L 2 G N"],
    C: Float[Tensor, "B L 2 G N"],
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H P"]:
    """The sum of an SSD over the tokens before each token, and of one over those after it.

    outputs[t] is output t - 1 of the forward scan plus output t + 1 of the backward scan: a
    quasiseparable matrix with a zero diagonal.

    Args:
        values: the inputs of each head.
        dt: step sizes of the forward scan, then of the backward scan.
        A: rates, shared by both directions.
        B: the input map of each token, per direction.
        C: the output map of each token, per direction; it reads the output for the next token.
        documents: document of each token; each document is contiguous.
    """
    # The backward scan is a forward scan of the reversed sequence: one call with twice the rows.
    both = torch.cat([values, values.flip(1)])
    steps, enter, leave = (torch.cat([x[:, :, 0], x[:, :, 1].flip(1)]) for x in (dt, B, C))
    ids = None if documents is None else torch.cat([documents, documents.flip(1)])
    outputs = ssd(both, steps, A, enter, leave, None, ids).outputs[:, :-1]
    if ids is not None:
        # A document's first token has no previous output.
        outputs = filled_where(outputs, ids[:, 1:] != ids[:, :-1])
    before, after = F.pad(outputs, (0, 0, 0, 0, 1, 0)).chunk(2)
    return before + after.flip(1)
