"""The chunked SSD algorithm in plain torch, differentiated by autograd, for when no kernel applies.

Source: Dao and Gu 2024, section 6: a masked matrix product within chunks, and a recurrence of
states between chunks. Log decays are summed in float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def ssd_in_chunks(
    values: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, "H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    initial: Float[Tensor, "B H P N"] | None,
    documents: Int[Tensor, "B L"] | None,
    chunk: int,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """Outputs and final state, by chunks of `chunk` tokens, in float32 or wider."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    L, G = values.shape[1], B.shape[2]
    x, steps, enter, leave = (_cut(tensor.to(dtype), chunk) for tensor in (values, dt, B, C))
    x, steps = (tensor.unflatten(3, (G, -1)) for tensor in (x, steps))
    # Float64: the exponential turns the absolute rounding of sums into a relative error of decays.
    exponents = (steps.double() * A.double().view(G, -1)).movedim(2, -1)
    if documents is None:
        sums = exponents.cumsum(-1)
        same = entering = leaving = torch.ones((), dtype=torch.bool, device=values.device)
    else:
        ids = _cut(documents, chunk, last=True)
        sums = _sum_in_documents(exponents, ids[:, :, None, None])
        before = F.pad(ids[:, :-1, -1:], (0, 0, 1, 0))
        same = (ids[:, :, :, None] == ids[:, :, None])[:, :, None, None]
        entering, leaving = ((ids == other)[:, :, None, None] for other in (before, ids[..., -1:]))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=values.device).tril()
    # The decay from token j to token i >= j: exp of the sum of dt A over the tokens between them.
    between = _decay(sums[..., :, None] - sums[..., None, :], same & later, dtype)
    # C B^T once per group; only the decays differ between its heads.
    pairs = torch.einsum("bkign,bkjgn->bkgij", leave, enter)
    matrix = between * pairs[:, :, :, None] * steps.movedim(2, -1)[..., None, :]
    inside = torch.einsum("bkgrij,bkjgrp->bkigrp", matrix, x)
    # What each token adds to the state after the chunk, decayed to the chunk's end.
    share = _decay(sums[..., -1:] - sums, leaving, dtype).movedim(-1, 2) * steps
    added = torch.einsum("bkjgrp,bkjgn->bkgrpn", share[..., None] * x, enter)
    entering_decay = _decay(sums, entering, dtype)
    # The recurrence between chunks; `states` are those before each chunk.
    state = torch.zeros_like(added[:, 0])
    if initial is not None:
        state = initial.to(dtype).view_as(state)
    states = []
    for kept, more in zip(entering_decay[..., -1].unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = kept[..., None, None] * state + more
    carried = torch.einsum("bkign,bkgrpn->bkigrp", leave, torch.stack(states, dim=1))
    outputs = inside + entering_decay.movedim(-1, 2)[..., None] * carried
    return outputs.flatten(1, 2)[:, :L].flatten(2, 3), state.flatten(1, 2)


def _cut(x: Tensor, chunk: int, *, last: bool = False) -> Tensor:
    """(B, L, ...) as (B, K, chunk, ...), padded with zeros or, if `last`, with the last entry."""
    missing = -x.shape[1] % chunk
    filling = x[:, -1:].expand(-1, missing, *x.shape[2:])
    return torch.cat([x, filling if last else torch.zeros_like(filling)], 1).unflatten(
        1, (-1, chunk)
    )


def _decay(exponents: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponential where `seen`, else 0; masked first, as an unseen exponent could overflow."""
    return exponents.masked_fill(~seen, -torch.inf).exp().to(dtype)


def _sum_in_documents(
    x: Float[Tensor, "*batch Q"], ids: Int[Tensor, "*rows Q"]
) -> Float[Tensor, "*batch Q"]:
    """Cumulative sums that restart with each document, by recursive doubling.

    A plain cumulative sum minus its value at the document's begin would add the rounding, or a NaN,
    of other documents.
    """
    stride = 1
    while stride < x.shape[-1]:
        same = ids[..., stride:] == ids[..., :-stride]
        added = x[..., stride:] + torch.where(same, x[..., :-stride], 0.0)
        x = torch.cat([x[..., :stride], added], dim=-1)
        stride *= 2
    return x
