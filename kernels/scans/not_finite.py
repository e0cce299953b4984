"""What is not finite kept to its document, where products of matrices would multiply it by zeros.

0 times NaN is NaN: the zeros by which products keep documents apart do not keep these apart.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


def unfit_tokens(
    values: Tensor, dt: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Bool[Tensor, "B L"], Bool[Tensor, "B"]]:
    """Which tokens, and which rows' initial states, hold what is not finite.

    An infinity or a NaN is found by a sum, which inherits it.
    """
    states = values.new_zeros(len(values), 1, 1) if initial is None else initial.unsqueeze(1)
    return _not_finite(values, dt, B, C), _not_finite(states)[:, 0]


def spoilt_tokens(
    unfit: Bool[Tensor, "B L"], no_start: Bool[Tensor, "B"], documents: Int[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Which tokens have an unfit one in their document, at them or before.

    Args:
        unfit: which tokens are.
        no_start: which rows' initial states are, which document 0 continues.
        documents: document of each token; those of one stand together.
    """
    first = unfit[:, :1] | (no_start[:, None] & (documents[:, :1] == 0))
    unfit = torch.cat([first, unfit[:, 1:]], dim=1)
    count = unfit.int().cumsum(1)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    # Counts never fall, so that the latest beginning has the largest.
    before = torch.where(begins, count - unfit.int(), 0).cummax(1).values
    return count > before


@torch.no_grad()
def _not_finite(*tensors: Tensor) -> Bool[Tensor, "B L"]:
    wide = (x.flatten(2).sum(2, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    return ~torch.stack([x.isfinite() for x in wide]).all(0)


def blanked(x: Tensor, where: Bool[Tensor, "B *L"], value: float = 0.0) -> Tensor:
    """A copy with a value in place of the tokens, or rows, at which a mask is set."""
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), value)
