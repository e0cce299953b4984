"""Sums over the tokens before and behind each, by SSD in both directions."""

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
    """Sum over the tokens before and those after each token, by one scan in either direction.

    outputs[t] is what `ssd` gives for token t - 1, and what it gives for token t + 1 when the
    sequence is read from its end: a quasiseparable matrix with zeros on its diagonal (Hwang et al.
    2024, section 3.2).

    Args:
        values: the inputs of each head.
        dt: step sizes of the scan from the front, then of that from the end.
        A: rates, the same both ways.
        B: how a token's input enters the state, either way.
        C: how the state enters the output of the token after it, either way.
        documents: document of each token; those of one stand together.
    """
    both = torch.cat([values, values.flip(1)])
    steps, enter, leave = (torch.cat([x[:, :, 0], x[:, :, 1].flip(1)]) for x in (dt, B, C))
    ids = None if documents is None else torch.cat([documents, documents.flip(1)])
    outputs = ssd(both, steps, A, enter, leave, None, ids).outputs[:, :-1]
    if ids is not None:
        outputs = filled_where(outputs, ids[:, 1:] != ids[:, :-1])
    before, after = F.pad(outputs, (0, 0, 0, 0, 1, 0)).chunk(2)
    return before + after.flip(1)
