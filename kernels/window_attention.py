"""Softmax attention over the nearest tokens, with work and memory linear in the length.

Source: Beltagy et al. 2020, "Longformer", section 3.1. A window of W is exactly W keys, the query's
own included: key j is seen by query i if 0 <= i - j <= W - 1. Blocks of queries meet the keys that
they see between them; the backward pass computes the probabilities again, so that none are kept.
On a GPU the Triton kernels of `interval_attention` do the same.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from kernels.interval_attention import interval_attention, neighbours
from kernels.precision import without_autocast
from kernels.runtime import uses_triton

# Queries of a block. Half as many are a tenth slower at a window of 256, because a product then
# reads its keys for few queries; twice as many are a tenth slower at a window of 64.
BLOCK = 64
# Scores computed at once. They should stay in the cache, but each tile costs a dozen calls.
TILE = 2**19
# Queries that meet their keys in one masked product, because laying out tiles would cost more.
FEW = 16


def window_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to the last `window` keys of its document, its own included.

    Scores are scaled by 1/sqrt(P). Computes in float32 or wider, whatever autocast says, and
    returns the dtype of `queries`.

    Args:
        queries: those of the last L of the S tokens.
        keys: one for each token; G divides H, and query head h reads key head h // (H / G).
        values: one for each token.
        window: keys that a query sees at most.
        documents: document of each of the S tokens; one document if not given.

    Raises:
        ValueError: there are fewer keys than queries, or the window is empty.
    """
    L, S = queries.shape[1], keys.shape[1]
    if window < 1 or S < L:
        raise ValueError(
            f"window {window} with {L} queries on {S} keys; take a window of 1 or more, and at "
            "least as many keys as queries"
        )
    before = min(window, S) - 1
    unseen = max(S - L - before, 0)
    keys, values = keys[:, unseen:], values[:, unseen:]
    if documents is not None:
        documents = documents[:, unseen:]
    if L <= FEW:
        return _attend_few(queries, keys, values, window, documents)
    return _attend(queries, keys, values, documents, (before, 0))


def centred_window_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B L G P"],
    values: Float[Tensor, "B L G Q"],
    window: int,
    documents: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Attend as `window_attention` does, but on both sides: query i sees |i - j| <= window - 1.

    Raises:
        ValueError: the window is empty.
    """
    if window < 1:
        raise ValueError(f"window {window} is empty; take 1 or more")
    reach = min(window, queries.shape[1]) - 1
    return _attend(queries, keys, values, documents, (reach, reach))


def window_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    window: int,
    documents: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Q"]:
    """Compute `window_attention` with a dense mask."""
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2).to(queries.dtype),
        values.transpose(1, 2).to(queries.dtype),
        attn_mask=_visible(queries.shape[1], keys.shape[1], window, documents, queries.device),
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, reach: tuple[int, int]
) -> Float[Tensor, "B L H Q"]:
    """Attend to as many keys before and after the own one as `reach` says."""
    L, S = queries.shape[1], keys.shape[1]
    if uses_triton(queries):
        ids = queries.new_zeros((1, S), dtype=torch.int32) if documents is None else documents
        return interval_attention(queries, keys, values, neighbours(ids, L, *reach))
    ids = queries.new_zeros((1, 1), dtype=torch.int32) if documents is None else documents
    return _Window.apply(queries, keys, values, ids, *reach)


def _attend_few(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, documents: Tensor | None
) -> Float[Tensor, "B L H Q"]:
    wide = torch.promote_types(queries.dtype, torch.float32)
    with without_autocast(queries):
        q, k, v = (x.to(wide) for x in (queries, keys, values))
        mixed = window_attention_reference(q, k, v, window, documents)
    return mixed.to(queries.dtype)


def _visible(
    L: int, S: int, window: int, documents: Tensor | None, device: torch.device
) -> Bool[Tensor, "..."]:
    place = torch.arange(S, device=device)
    behind = place[S - L :, None] - place[None, :]
    near = (behind >= 0) & (behind < window)
    if documents is None:
        return near
    return (near & (documents[:, S - L :, None] == documents[:, None, :]))[:, None]


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, before: int, after: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, ids)
        ctx.reach = before, after  # pyright: ignore[reportAttributeAccessIssue]
        laid = _lay_out(q, k, v, ids, before, after)
        mixed = laid.queries.new_empty(*laid.queries.shape[:-1], v.shape[-1])
        with without_autocast(q):
            for tile in laid.tiles():
                mixed[tile.block] = laid.shares(tile) @ laid.values[tile.keys]
        return _unblocked(mixed, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ids = list(ctx.saved_tensors)
        laid = _lay_out(q, k, v, ids, *ctx.reach)  # pyright: ignore[reportAttributeAccessIssue]
        d_rows = _blocked(d_mixed.to(laid.queries.dtype), laid.cut.size, k.shape[2])
        d_q = torch.empty_like(laid.queries)
        d_k, d_v = torch.zeros_like(laid.keys), torch.zeros_like(laid.values)
        with without_autocast(q):
            for tile in laid.tiles():
                rows, d_row, share = laid.queries[tile.block], d_rows[tile.block], laid.shares(tile)
                d_v[tile.keys] += share.mT @ d_row
                d_share = d_row @ laid.values[tile.keys].mT
                d_score = torch.ops.aten._softmax_backward_data(d_share, share, -1, share.dtype)
                d_k[tile.keys] += d_score.mT @ rows
                d_q[tile.block] = d_score @ laid.keys[tile.keys]
        d_q = _unblocked(d_q.mul_(q.shape[-1] ** -0.5), q)
        d_k, d_v = d_k.transpose(1, 2), d_v.transpose(1, 2)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


class _Cut(NamedTuple):
    """How a length is cut into blocks of queries, and which keys a query sees.

    Attributes:
        count: blocks.
        size: queries of a block.
        length: queries in all; those that fill up the last block come after them.
        own: index of the first query's own key.
        before: keys that a query sees before its own.
        after: keys that a query sees after its own.
    """

    count: int
    size: int
    length: int
    own: int
    before: int
    after: int


class _Tile(NamedTuple):
    """One block of queries of some rows, and the keys that any of them may see."""

    rows: slice
    number: int
    places: slice

    @property
    def block(self) -> tuple[slice, slice, int]:
        """Where the block is among blocked queries."""
        return self.rows, slice(None), self.number

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        """Where its keys are among all."""
        return self.rows, slice(None), self.places


class _Laid(NamedTuple):
    """Blocks of scaled queries, and keys and values, heads in front.

    A block's keys are a slice of all, so that no product needs a copy of them.
    """

    queries: Float[Tensor, "B G N CR P"]
    keys: Float[Tensor, "B G S P"]
    values: Float[Tensor, "B G S Q"]
    documents: Int[Tensor, "b S"]
    cut: _Cut

    def tiles(self) -> Iterator[_Tile]:
        """Cut the work into blocks, of as many rows as have about `TILE` scores."""
        B, G, N, CR, _ = self.queries.shape
        _, C, _, own, before, after = self.cut
        rows = max(1, TILE // (G * CR * (before + C + after)))
        for row in range(0, B, rows):
            for number in range(N):
                first = own + number * C
                places = slice(max(first - before, 0), min(first + C + after, self.keys.shape[2]))
                yield _Tile(slice(row, row + rows), number, places)

    def shares(self, tile: _Tile) -> Float[Tensor, "B G CR K"]:
        """The probability of each key of a block for each of its queries."""
        scores = self.queries[tile.block] @ self.keys[tile.keys].mT
        by_query = scores.unflatten(2, (self.cut.size, -1))
        # Some 25 times faster than to fill where a mask says; an infinite score is hidden too.
        torch.minimum(by_query, self._limits(tile)[:, None, :, None], out=by_query)
        return torch.softmax(scores, dim=-1)

    def _limits(self, tile: _Tile) -> Float[Tensor, "b C K"]:
        """What scores may be at most: minus infinity where a query does not see a key.

        Queries that fill up the last block see every key, so that there is no row without one.
        """
        _, C, length, own, before, after = self.cut
        row = torch.arange(tile.number * C, (tile.number + 1) * C, device=self.documents.device)
        at = (own + row)[:, None]
        place = torch.arange(tile.places.start, tile.places.stop, device=row.device)
        hidden = ((place < at - before) | (place > at + after))[None]
        if self.documents.shape[1] > 1:
            ids = self.documents[tile.rows] if self.documents.shape[0] > 1 else self.documents
            mine = ids[:, at.clamp(max=ids.shape[1] - 1).flatten()]
            hidden = hidden | (mine[:, :, None] != ids[:, None, tile.places])
        hidden = hidden & (row < length)[:, None]
        limits = self.queries.new_full(hidden.shape, math.inf)
        return limits.masked_fill_(hidden, -math.inf)


def _lay_out(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, before: int, after: int) -> _Laid:
    L, S, C = q.shape[1], k.shape[1], min(BLOCK, q.shape[1])
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return _Laid(
        _blocked(q.to(accumulator) * q.shape[-1] ** -0.5, C, k.shape[2]),
        k.to(accumulator).transpose(1, 2).contiguous(),
        v.to(accumulator).transpose(1, 2).contiguous(),
        ids,
        _Cut(-(-L // C), C, L, S - L, before, after),
    )


def _blocked(x: Tensor, size: int, groups: int) -> Float[Tensor, "B G N CR P"]:
    count = -(-x.shape[1] // size)
    x = F.pad(x, (0, 0, 0, 0, 0, count * size - x.shape[1]))
    x = x.unflatten(2, (groups, -1)).unflatten(1, (count, size))
    return x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).contiguous()


def _unblocked(x: Tensor, like: Tensor) -> Float[Tensor, "B L H P"]:
    L, C = like.shape[1], min(BLOCK, like.shape[1])
    x = x.unflatten(3, (C, -1)).permute(0, 2, 3, 1, 4, 5)
    return x.flatten(3, 4).flatten(1, 2)[:, :L].to(like.dtype)
