"""Attention slots: softmax-weighted running averages of tokens, with separate weights per slot.

slot[t, c] = sum_{s <= t} exp(a[s, c]) x[s] / sum_{s <= t} exp(a[s, c])

With the log-sum-exp l[t, c] of the logits so far, a token's share in a slot is
exp(a[s, c] - l[t, c]) <= 1: no overflow at any logits, and no stabiliser that would depend on later
tokens or other documents. Shares are formed within chunks; between chunks a slot decays by
exp(l before - l after).

Source: the recurrence of Peng et al. 2022, "ABC: Attention with Bounded-memory Control", section
2.2, normalised by the tokens so far; derived here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.derivatives import in_plain_torch
from kernels.precision import without_autocast
from kernels.scans.linear_attention import chunked_documents, continuing
from kernels.scans.linear_scan import linear_scan

# Tokens per chunk. Shares take CHUNK numbers per token and slot, the slots between chunks P /
# CHUNK. At heads of 64, 8 and 16 are equally fast.
CHUNK = 16


class Slots(NamedTuple):
    """What determines the shares.

    Attributes:
        logits: a[t, c].
        log_sums: l[t, c], from `slot_log_sums`.
        initial: l[-1, c]; None if nothing precedes.
        documents: document of each token, nondecreasing except for padding at the end; None for a
            single one. Document 0 continues what precedes.
    """

    logits: Float[Tensor, "B L H C"]
    log_sums: Float[Tensor, "B L H C"]
    initial: Float[Tensor, "B H C"] | None = None
    documents: Int[Tensor, "B L"] | None = None


def slot_log_sums(
    logits: Float[Tensor, "B L H C"],
    initial: Float[Tensor, "B H C"] | None = None,
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H C"]:
    """Compute l[t, c], the logarithm of the sum of exp(a[s, c]) over the document's tokens so far.

    Args:
        logits: a[t, c].
        initial: l[-1, c]; None if nothing precedes.
        documents: as in `Slots`.
    """
    L, ids = logits.shape[1], None if documents is None else chunked_documents(documents, CHUNK)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = _sums_inside(_fill(wide, float("-inf")), ids)
    totals, first = inside[:, :, :, -1], torch.full_like(inside[:, :1, :, 0], float("-inf"))
    if initial is not None:
        first = initial.to(wide.dtype)[:, None]
    carry = first
    if totals.shape[1] > 1:
        # The same recursively over chunks, each with its total and its last token's document.
        last = None if ids is None else ids[:, :, -1]
        carry = torch.cat([first, slot_log_sums(totals, initial, last)[:, :-1]], dim=1)
    carry = carry[:, :, :, None]
    if ids is not None:
        carry = carry.masked_fill(~continuing(ids)[:, :, None, :, None], float("-inf"))
    return _log_add_exp(inside, carry).transpose(2, 3).flatten(1, 2)[:, :L]


def read_slots(
    queries: Float[Tensor, "B L H P"],
    x: Float[Tensor, "B L H P"],
    slots: Slots,
    initial: Float[Tensor, "B H C P"] | None = None,
) -> tuple[Float[Tensor, "B L H C"], Float[Tensor, "B H C P"]]:
    """Products of each query with all slots at its token, and the slots after the last token."""
    with without_autocast(x):
        parts = _Chunks.of(slots)
        q, inputs = parts.split(queries), parts.split(x)
        before, final = parts.states(inputs, initial)
        products = q @ inputs.transpose(-1, -2)
        inside = (products[..., None, :] @ parts.shares).squeeze(-2)
        carried = parts.carry * (q @ before.transpose(-1, -2))
        return parts.join(inside + carried), final


def mix_slots(
    weights: Float[Tensor, "B L H C"],
    x: Float[Tensor, "B L H P"],
    slots: Slots,
    initial: Float[Tensor, "B H C P"] | None = None,
) -> tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H C P"]]:
    """The weighted sum of the slots at each token, and the slots after the last token."""
    with without_autocast(x):
        parts = _Chunks.of(slots)
        w, inputs = parts.split(weights), parts.split(x)
        before, final = parts.states(inputs, initial)
        # Weights times shares is the mixing matrix within a chunk.
        # shares[t, s, c] is zero for s > t, so the matrix is causal as it is.
        matrix = (parts.shares @ w[..., None]).squeeze(-1)
        mixed = parts.join(matrix @ inputs + (w * parts.carry) @ before)
        return mixed.to(x.dtype), final


def slot_averages(
    x: Float[Tensor, "B L H P"],
    slots: Slots,
    initial: Float[Tensor, "B H C P"] | None = None,
) -> tuple[Float[Tensor, "B L H C P"], Float[Tensor, "B H C P"]]:
    """All slots at every token, and the slots after the last token."""
    with without_autocast(x):
        parts = _Chunks.of(slots)
        inputs = parts.split(x)
        before, final = parts.states(inputs, initial)
        inside = torch.einsum("bjhtsc,bjhsp->bjhtcp", parts.shares, inputs)
        averages = parts.join(inside + parts.carry[..., None] * before[:, :, :, None])
        return averages.to(x.dtype), final


class _Chunks(NamedTuple):
    """Shares of tokens, and of the previous slots, in chunks.

    Attributes:
        shares: share of token s in the slots at token t of the same chunk.
        carry: share of the slots before the chunk at its token t.
        decays: log of the carry at each chunk's last token.
        documents: document of each chunk's last token; None for a single one.
        length: number of tokens.
    """

    shares: Float[Tensor, "B J H T T C"]
    carry: Float[Tensor, "B J H T C"]
    decays: Float[Tensor, "B J H C"]
    documents: Int[Tensor, "B J"] | None
    length: int

    @classmethod
    def of(cls, slots: Slots) -> "_Chunks":
        """Form the shares."""
        sums, L = slots.log_sums, slots.logits.shape[1]
        # Padding of the last chunk has no share, and does not change the slots.
        logits = _fill(slots.logits.to(sums.dtype), float("-inf"))
        sums = torch.cat([sums, sums[:, -1:].expand(-1, -L % CHUNK, -1, -1)], dim=1)
        sums = sums.unflatten(1, (-1, CHUNK)).transpose(2, 3)
        first = torch.full_like(sums[:, 0, :, 0], float("-inf"))
        if slots.initial is not None:
            first = slots.initial.to(sums.dtype)
        before = torch.cat([first[:, None], sums[:, :-1, :, -1]], dim=1)
        carry, last = before[:, :, :, None] - sums, None
        seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=sums.device).tril()
        if slots.documents is not None:
            ids = chunked_documents(slots.documents, CHUNK)
            last = ids[:, :, -1]
            carry = carry.masked_fill(~continuing(ids)[:, :, None, :, None], float("-inf"))
            seen = seen & (ids[:, :, None, :, None] == ids[:, :, None, None, :])
        shares = logits[:, :, :, None] - sums[:, :, :, :, None]
        shares = shares.masked_fill(~seen[..., None], float("-inf"))
        return cls(shares.exp(), carry.exp(), carry[:, :, :, -1], last, L)

    def split(self, x: Float[Tensor, "B L H N"]) -> Float[Tensor, "B J H T N"]:
        """Cut tokens into chunks, in the dtype of the shares."""
        return _fill(x.to(self.shares.dtype), 0.0)

    def join(self, x: Float[Tensor, "B J H T *rest"]) -> Float[Tensor, "B L H *rest"]:
        """Put the tokens of all chunks together."""
        return x.transpose(2, 3).flatten(1, 2)[:, : self.length]

    def states(
        self, x: Float[Tensor, "B J H T P"], initial: Float[Tensor, "B H C P"] | None
    ) -> tuple[Float[Tensor, "B J H C P"], Float[Tensor, "B H C P"]]:
        """The slots before each chunk, and those after the last."""
        added = self.shares[:, :, :, -1].transpose(-1, -2) @ x
        state = torch.zeros_like(added[:, 0]) if initial is None else initial.to(x.dtype)
        # Slots between chunks are a linear scan over chunks.
        decays = self.decays[..., None].expand_as(added)
        scanned = linear_scan(
            decays.flatten(2), added.flatten(2), state.flatten(1), self.documents
        ).outputs.view_as(added)
        return torch.cat([state[:, None], scanned[:, :-1]], dim=1), scanned[:, -1]


def _sums_inside(
    logits: Float[Tensor, "B J H T C"], ids: Int[Tensor, "B J T"] | None
) -> Float[Tensor, "B J H T C"]:
    """Cumulative log-sum-exp within chunks, by recursive doubling."""
    sums, reach = logits, 1
    while reach < CHUNK:
        later, earlier = sums[:, :, :, reach:], sums[:, :, :, :-reach]
        if ids is not None:
            other = ids[:, :, reach:] != ids[:, :, :-reach]
            earlier = earlier.masked_fill(other[:, :, None, :, None], float("-inf"))
        joined = _log_add_exp(later, earlier)
        sums, reach = torch.cat([sums[:, :, :, :reach], joined], dim=3), 2 * reach
    return sums


def _log_add_exp(one: Tensor, other: Tensor) -> Tensor:
    if not in_plain_torch():
        return torch.logaddexp(one, other)
    # The second derivative of torch's logaddexp is NaN where one of the two is minus infinity.
    largest = torch.maximum(one, other).detach()
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    shares = torch.exp(one - largest) + torch.exp(other - largest)
    empty = shares == 0
    logs = torch.log(shares.masked_fill(empty, 1.0)).masked_fill(empty, float("-inf"))
    return largest + logs


def _fill(x: Float[Tensor, "B L H N"], value: float) -> Float[Tensor, "B J H T N"]:
    filled = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK), value=value)
    return filled.unflatten(1, (-1, CHUNK)).transpose(2, 3)
