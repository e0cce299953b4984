"""Monarch matrices of order two: products of block-diagonal factors with a permutation between.

Source: Dao et al. 2022, "Monarch", sections 3.1 and 3.3, in the form of its release: `first` holds
k blocks (k, q, p) that map p inputs to q, `second` l blocks (l, s, r) that map r to s, k q = l r.
"""

import math

import torch
from jaxtyping import Float, Inexact
from torch import Tensor


def monarch_multiply(
    x: Inexact[Tensor, "*batch n"],
    first: Inexact[Tensor, "k q p"],
    second: Inexact[Tensor, "l s r"],
) -> Inexact[Tensor, "*batch m"]:
    """Multiply by `first`, deal the results out among the blocks of `second`, gather them again."""
    l, _, r = second.shape  # noqa: E741
    inner = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (first.shape[0], -1)), first)
    dealt = inner.flatten(-2).unflatten(-1, (r, l)).transpose(-1, -2)
    outer = torch.einsum("...lr,lsr->...ls", dealt, second)
    return outer.transpose(-1, -2).flatten(-2)


def monarch_entries(
    first: Inexact[Tensor, "k q p"], second: Inexact[Tensor, "l s r"]
) -> Inexact[Tensor, "m n"]:
    """Write the matrix out; with square blocks m[s l, k p] = second[l, s, k] first[k, l, p]."""
    n = first.shape[0] * first.shape[2]
    units = torch.eye(n, dtype=first.dtype, device=first.device)
    return monarch_multiply(units, first, second).t()


def project_to_monarch(
    matrix: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, "b b b"], Float[Tensor, "b b b"]]:
    """Find the factors of the Monarch matrix that is nearest in the Frobenius norm.

    Every slice of fixed (k, l) over (s, p) has rank 1 in a Monarch matrix, and the slices share no
    entry: the best of each, by its largest singular value, is the best of all.

    Raises:
        ValueError: the size is no square.
    """
    n = matrix.shape[0]
    b = math.isqrt(n)
    if b * b != n:
        raise ValueError(
            f"a matrix of size {n} has no square blocks; take a size that is a square, such as "
            f"{b * b} or {(b + 1) ** 2}"
        )
    slices = matrix.reshape(b, b, b, b).permute(2, 1, 0, 3)  # (k, l, s, p)
    U, S, Vh = torch.linalg.svd(slices, full_matrices=False)
    root = S[..., :1].sqrt()
    return Vh[..., 0, :] * root, (U[..., 0] * root).permute(1, 2, 0)
