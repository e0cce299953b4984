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

# Queries of a block. Half as many are a sixth slower at a window of 256, because a product then
# reads its keys for few queries; twice as many are a sixth slower at a window of 64.
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
    ids = queries.new_zeros((1, S), dtype=torch.int32) if documents is None else documents
    if uses_triton(queries):
        return interval_attention(queries, keys, values, neighbours(ids, L, *reach))
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
                values = laid.windows(laid.values, tile)
                mixed[tile.rows, :, tile.blocks] = laid.shares(tile) @ values
        return _unblocked(mixed, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ids = list(ctx.saved_tensors)
        laid = _lay_out(q, k, v, ids, *ctx.reach)  # pyright: ignore[reportAttributeAccessIssue]
        d_rows = _blocked(d_mixed.to(laid.queries.dtype), laid.cut, k.shape[2])
        d_q, d_k, d_v = torch.empty_like(laid.queries), laid.zeros(k), laid.zeros(v)
        with without_autocast(q):
            for tile in laid.tiles():
                rows, d_row = (x[tile.rows, :, tile.blocks] for x in (laid.queries, d_rows))
                share = laid.shares(tile)
                laid.add(d_v, share.mT @ d_row, tile)
                d_share = d_row @ laid.windows(laid.values, tile).mT
                d_score = d_share.sub_((d_share * share).sum(-1, keepdim=True)).mul_(share)
                laid.add(d_k, d_score.mT @ rows, tile)
                d_q[tile.rows, :, tile.blocks] = d_score @ laid.windows(laid.keys, tile)
        front, S = laid.cut.front, k.shape[1]
        d_k, d_v = (x[:, :, front : front + S].transpose(1, 2) for x in (d_k, d_v))
        d_q = _unblocked(d_q * q.shape[-1] ** -0.5, q)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


class _Cut(NamedTuple):
    """How a length is cut into blocks of queries, and which keys a block sees.

    Attributes:
        count: blocks.
        size: queries of a block.
        before: keys that a query sees before its own.
        after: keys that a query sees after its own.
        front: places filled up before the first key, so that each block finds as many keys.
    """

    count: int
    size: int
    before: int
    after: int
    front: int


class _Tile(NamedTuple):
    """Rows and blocks computed at once, and which of a block's keys may be seen by any of them."""

    rows: slice
    blocks: slice
    keys: slice


class _Laid(NamedTuple):
    """Blocks of scaled queries, and keys and values filled up on both sides, heads in front."""

    queries: Float[Tensor, "B G N CR P"]
    keys: Float[Tensor, "B G M P"]
    values: Float[Tensor, "B G M Q"]
    documents: Int[Tensor, "b M"]
    cut: _Cut

    def tiles(self) -> Iterator[_Tile]:
        """Cut the work into pieces of about `TILE` scores."""
        B, G, N, CR, _ = self.queries.shape
        _, C, before, after, front = self.cut
        scores = G * CR * (before + C + after)
        blocks = max(1, min(N, TILE // scores))
        rows = max(1, TILE // (scores * N))
        for row in range(0, B, rows):
            for first in range(0, N, blocks):
                past = min(N, first + blocks)
                begin = max(0, front - (past - 1) * C)
                end = before + min(C + after, (N - first) * C)
                yield _Tile(slice(row, row + rows), slice(first, past), slice(begin, end))

    def windows(self, x: Tensor, tile: _Tile) -> Float[Tensor, "B G N K P"]:
        """View the keys or values of each block of the tile."""
        width = tile.keys.stop - tile.keys.start
        return x[tile.rows, :, self._span(tile)].unfold(2, width, self.cut.size).mT

    def shares(self, tile: _Tile) -> Float[Tensor, "B G N CR K"]:
        """The probability of each key of a block for each of its queries."""
        scores = self.queries[tile.rows, :, tile.blocks] @ self.windows(self.keys, tile).mT
        by_query = scores.unflatten(3, (self.cut.size, -1))
        by_query.masked_fill_(self._hidden(tile)[:, None, :, :, None], -math.inf)
        return torch.softmax(scores, dim=-1)

    def zeros(self, like: Tensor) -> Float[Tensor, "B G M P"]:
        """Room for the gradient of keys or values, and for what the last window has too much."""
        B, G, M, _ = self.keys.shape
        return self.keys.new_zeros(B, G, M + self.cut.size, like.shape[-1])

    def add(self, total: Tensor, windows: Tensor, tile: _Tile) -> None:
        """Add what each window has to the places it stands for, where windows overlap."""
        C, (n, K) = self.cut.size, windows.shape[2:4]
        begin = self._span(tile).start
        # Pieces as long as a block lie side by side; those of one window can be as long as it is.
        step = C if n > 1 else K
        for offset in range(0, K, step):
            piece = windows[:, :, :, offset : offset + step]
            place = total[tile.rows, :, begin + offset : begin + offset + n * step]
            place.unflatten(2, (n, step))[:, :, :, : piece.shape[3]] += piece

    def _hidden(self, tile: _Tile) -> Bool[Tensor, "b N C K"]:
        _, C, before, after, _ = self.cut
        row = torch.arange(C, device=self.documents.device)[:, None]
        column = torch.arange(tile.keys.start, tile.keys.stop, device=row.device)
        far = (column < row) | (column > row + before + after)
        ids = self.documents if self.documents.shape[0] == 1 else self.documents[tile.rows]
        own = ids[:, tile.blocks.start * C + before : tile.blocks.stop * C + before]
        seen = ids[:, self._span(tile)].unfold(1, len(column), C)
        return far | (own.unflatten(1, (-1, C))[:, :, :, None] != seen[:, :, None])

    def _span(self, tile: _Tile) -> slice:
        """Where the keys of a tile lie, from its first block's first to its last block's last."""
        C, (_, blocks, keys) = self.cut.size, tile
        return slice(blocks.start * C + keys.start, (blocks.stop - 1) * C + keys.stop)


def _lay_out(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, before: int, after: int) -> _Laid:
    L, S, C = q.shape[1], k.shape[1], min(BLOCK, q.shape[1])
    cut = _Cut(-(-L // C), C, before, after, before - (S - L))
    accumulator = torch.promote_types(q.dtype, torch.float32)
    behind = cut.count * C - L + after
    # No document has this id: real queries do not see what is filled up, which sees itself, so
    # that there is no row without a key.
    nowhere = torch.iinfo(ids.dtype).min
    return _Laid(
        _blocked(q.to(accumulator) * q.shape[-1] ** -0.5, cut, k.shape[2]),
        _filled_up(k.to(accumulator), cut.front, behind),
        _filled_up(v.to(accumulator), cut.front, behind),
        F.pad(ids, (cut.front, behind), value=nowhere),
        cut,
    )


def _blocked(x: Tensor, cut: _Cut, groups: int) -> Float[Tensor, "B G N CR P"]:
    x = F.pad(x, (0, 0, 0, 0, 0, cut.count * cut.size - x.shape[1]))
    x = x.unflatten(2, (groups, -1)).unflatten(1, (cut.count, cut.size))
    return x.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).contiguous()


def _unblocked(x: Tensor, like: Tensor) -> Float[Tensor, "B L H P"]:
    L, C = like.shape[1], min(BLOCK, like.shape[1])
    x = x.unflatten(3, (C, -1)).permute(0, 2, 3, 1, 4, 5)
    return x.flatten(3, 4).flatten(1, 2)[:, :L].to(like.dtype)


def _filled_up(x: Tensor, front: int, behind: int) -> Float[Tensor, "B G M P"]:
    return F.pad(x.transpose(1, 2), (0, 0, front, behind))
