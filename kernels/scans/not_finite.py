"""Keep NaN and infinity in their own document, where documents share a product of matrices.

The product masks other documents by zeros, and 0 * NaN is NaN. So tokens with a non-finite input
are found first and left out, and the outputs that depend on them are set to NaN afterwards. Ours.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

NON_FINITE = -(2**31)
"""Document id for Triton kernels of tokens after a non-finite input; they are never loaded."""


def non_finite_tokens(
    values: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Bool[Tensor, "B L"], Bool[Tensor, "B"]]:
    """Mark the tokens, and the rows' initial states, that hold a NaN or an infinity.

    Tests the sum over each token's channels, which is non-finite if one of them is.
    """
    states = values.new_zeros(len(values), 1, 1) if initial is None else initial.unsqueeze(1)
    return _not_finite(values, dt, B, C), _not_finite(states)[:, 0]


def tokens_after_non_finite(
    non_finite: Bool[Tensor, "B L"], bad_initial: Bool[Tensor, "B"], documents: Int[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Mark the tokens at or after the first non-finite one of their document.

    Args:
        non_finite: the tokens with a non-finite input.
        bad_initial: the rows with a non-finite initial state, which document 0 continues.
        documents: document of each token; each document is contiguous.
    """
    first = non_finite[:, :1] | (bad_initial[:, None] & (documents[:, :1] == 0))
    non_finite = torch.cat([first, non_finite[:, 1:]], dim=1)
    count = non_finite.int().cumsum(1)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    # The count before each token's document: counts never fall, so cummax finds the latest one.
    before = torch.where(begins, count - non_finite.int(), 0).cummax(1).values
    return count > before


@torch.no_grad()
def _not_finite(*tensors: Tensor) -> Bool[Tensor, "B L"]:
    # One sum per token instead of a mask of the tensor's size. Finite numbers whose sum overflows
    # are taken for infinite ones.
    wide = (x.flatten(2).sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    return ~torch.stack([x.isfinite() for x in wide]).all(0)


def filled_where(x: Tensor, where: Bool[Tensor, "B *L"], value: float = 0.0) -> Tensor:
    """Copy a tensor, with `value` in the tokens, or rows, that a mask marks."""
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), value)
