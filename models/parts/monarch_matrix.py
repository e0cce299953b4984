"""Monarch matrices of order two: products of block-diagonal factors with a permutation between.

Source: Dao et al. 2022, "Monarch", section 3.1, in the form of its release: `first` holds
k blocks (k, q, p) that map p inputs to q, `second` l blocks (l, s, r) that map r to s, k q = l r.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor


def monarch_multiply(
    x: Inexact[Tensor, "*batch n"],
    first: Inexact[Tensor, "k q p"],
    second: Inexact[Tensor, "l s r"],
) -> Inexact[Tensor, "*batch m"]:
    """Multiply by `first`, permute, multiply by `second`, and permute back."""
    l, _, r = second.shape  # noqa: E741
    inner = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (first.shape[0], -1)), first)
    # The permutation: entry i goes to block i mod l of the second factor.
    dealt = inner.flatten(-2).unflatten(-1, (r, l)).transpose(-1, -2)
    outer = torch.einsum("...lr,lsr->...ls", dealt, second)
    return outer.transpose(-1, -2).flatten(-2)
