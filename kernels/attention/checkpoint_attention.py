"""Softmax attention of each token to itself and to earlier checkpoints of its document.

Source: Jafari et al. 2025, "SCOUT: Toward Sub-Quadratic Attention via Segment Compression for
Optimized Utility in Transformers", and the authors' release. Changed: packed documents. Queries are
processed in tiles with the range of checkpoints that they see; the backward pass recomputes
probabilities. On a GPU the Triton kernels of `interval_attention` compute the same.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.attention.interval_attention import Intervals, Own, interval_attention
from kernels.derivatives import differentiated_once, in_plain_torch
from kernels.dispatch import uses_triton
from kernels.precision import without_autocast

# Scores per tile: few enough for the cache, but enough for the overhead of some twenty torch calls.
TILE = 2**19
# Queries per tile. Long tiles compute scores that only their last queries need; short ones read all
# checkpoints for few queries.
SHORTEST, LONGEST = 64, 256


class Segments(NamedTuple):
    """Visibility in rows of one document: positions >= (c + 1) every see checkpoint c.

    Attributes:
        every: tokens per segment.
        first: position of the first query.
    """

    every: int
    first: int

    def shape(self, queries: int) -> tuple[int, int]:
        """How many queries and checkpoints there must be."""
        return queries, (self.first + queries) // self.every

    def visible(self, rows: slice, queries: slice, seen: slice, like: Tensor) -> Tensor:
        """Which checkpoints each query sees, the same in all rows (1, L, S)."""
        del rows
        places = torch.arange(queries.start, queries.stop, device=like.device) + self.first
        numbers = torch.arange(seen.start, seen.stop, device=like.device)
        return numbers < (places // self.every)[None, :, None]

    def intervals(self, queries: int) -> Intervals:
        """The checkpoints that each query sees, the same in all rows."""
        past = (torch.arange(queries) + self.first) // self.every
        return Intervals(torch.zeros_like(past)[None], past[None])

    def shown(self) -> Bool[Tensor, "B S"] | None:
        """Which checkpoints are visible to any query; None for all."""
        return None

    def spans(self, queries: int, length: int) -> "_Spans":
        """The range of checkpoints that each run of `length` queries sees."""
        ends = [min(begin + length, queries) for begin in range(0, queries, length)]
        past = [(self.first + end - 1) // self.every for end in ends]
        return _Spans([[0] * len(past)], [past])


class Places(NamedTuple):
    """Visibility by documents and positions: later tokens of its document see a checkpoint.

    Attributes:
        documents: document of each query, nondecreasing along a row; negative for padding, at the
            end of a row, which sees only itself.
        positions: position of each query in its document.
        checkpoint_documents: document of each checkpoint, nondecreasing along a row except for
            negative ones, which are never visible.
        checkpoint_positions: position of the last token that a checkpoint covers; increasing within
            a document.
    """

    documents: Int[Tensor, "B L"]
    positions: Int[Tensor, "B L"]
    checkpoint_documents: Int[Tensor, "B S"]
    checkpoint_positions: Int[Tensor, "B S"]

    def shape(self, queries: int) -> tuple[int, int]:
        """How many queries and checkpoints there must be."""
        del queries
        return self.documents.shape[1], self.checkpoint_documents.shape[1]

    def visible(self, rows: slice, queries: slice, seen: slice, like: Tensor) -> Tensor:
        """Which checkpoints each query sees (B, L, S)."""
        del like
        documents = self.checkpoint_documents[rows, seen][:, None, :]
        same = (self.documents[rows, queries][:, :, None] == documents) & (documents >= 0)
        positions = self.checkpoint_positions[rows, seen][:, None, :]
        return same & (positions < self.positions[rows, queries][:, :, None])

    def intervals(self, queries: int) -> Intervals:
        """The range of checkpoints of each query, which may include invisible ones.

        The pair (document, position), encoded as one integer, is nondecreasing along a row, so a
        binary search finds both ends. Invisible checkpoints take the key of the previous one.
        """
        documents, positions, of_checkpoints, ends = (x.long() for x in self)
        if ends.shape[1] == 0:
            nothing = documents.new_zeros(1, queries)
            return Intervals(nothing, nothing)
        order = torch.where(of_checkpoints < 0, -1, of_checkpoints * 2**32 + ends)
        order = torch.cummax(order, dim=1).values
        begins, here = documents * 2**32, documents * 2**32 + positions
        # Padding searches behind every checkpoint with both ends: its interval is empty.
        begins, here = (x.masked_fill(documents < 0, 2**62) for x in (begins, here))
        return Intervals(torch.searchsorted(order, begins), torch.searchsorted(order, here))

    def shown(self) -> Bool[Tensor, "B S"] | None:
        """Which checkpoints are visible to any query."""
        return self.checkpoint_documents >= 0

    def spans(self, queries: int, length: int) -> "_Spans":
        """The range of checkpoints that each run of `length` queries sees."""
        first, past = self.intervals(queries)
        # Padding sees no checkpoint; it must not extend the range of its run.
        past = past.masked_fill(self.documents < 0, 0)
        behind = (0, -queries % length)
        first = F.pad(first, behind, value=2**62).unflatten(1, (-1, length)).amin(dim=2)
        past = F.pad(past, behind, value=0).unflatten(1, (-1, length)).amax(dim=2)
        return _Spans(first.tolist(), past.tolist())


def checkpoint_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B L G P"],
    values: Float[Tensor, "B L G Q"],
    checkpoint_keys: Float[Tensor, "B S G P"],
    checkpoint_values: Float[Tensor, "B S G Q"],
    sight: Segments | Places,
) -> Float[Tensor, "B L H Q"]:
    """Attend with each query to its own key and the checkpoints before it, in one softmax.

    Scores are scaled by 1/sqrt(P). Computes in float32 or wider, whatever autocast says, and
    returns the dtype of `queries`.

    Args:
        queries: one per token.
        keys: the tokens' own keys; G divides H, and query head h reads key head h // (H / G).
        values: the tokens' own values.
        checkpoint_keys: keys of all checkpoints, in order.
        checkpoint_values: one per checkpoint.
        sight: which checkpoints each query sees.

    Raises:
        ValueError: `sight` is for other numbers of queries or checkpoints.
    """
    given = queries.shape[1], checkpoint_keys.shape[1]
    needed = sight.shape(queries.shape[1])
    if given != needed:
        raise ValueError(
            f"checkpoint_attention got {given[0]} queries and {given[1]} checkpoints, but sight is "
            f"for {needed[0]} and {needed[1]}; give as many"
        )
    if in_plain_torch():
        wide = torch.promote_types(queries.dtype, torch.float32)
        q, k, v, ck, cv = (
            x.to(wide) for x in (queries, keys, values, checkpoint_keys, checkpoint_values)
        )
        with without_autocast(queries):
            mixed = checkpoint_attention_reference(q, k, v, ck, cv, sight)
        return mixed.to(queries.dtype)
    if uses_triton(queries):
        seen = Intervals(*(x.to(queries.device) for x in sight.intervals(given[0])))
        own = Own(keys, values)
        return interval_attention(
            queries, checkpoint_keys, checkpoint_values, seen, own, sight.shown()
        )
    return _Checkpoints.apply(queries, keys, values, checkpoint_keys, checkpoint_values, sight)


def checkpoint_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B L G P"],
    values: Float[Tensor, "B L G Q"],
    checkpoint_keys: Float[Tensor, "B S G P"],
    checkpoint_values: Float[Tensor, "B S G Q"],
    sight: Segments | Places,
) -> Float[Tensor, "B L H Q"]:
    """Compute `checkpoint_attention` with a dense mask."""
    L, S = queries.shape[1], checkpoint_keys.shape[1]
    visible = sight.visible(slice(None), slice(0, L), slice(0, S), queries)
    own = torch.eye(L, dtype=torch.bool, device=queries.device).expand(len(visible), L, L)
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        torch.cat([keys, checkpoint_keys], dim=1).transpose(1, 2).to(queries.dtype),
        torch.cat([values, checkpoint_values], dim=1).transpose(1, 2).to(queries.dtype),
        attn_mask=torch.cat([own, visible], dim=-1)[:, None],
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2)


class _Checkpoints(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        checkpoint_k: Tensor,
        checkpoint_v: Tensor,
        sight: Segments | Places,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, checkpoint_k, checkpoint_v)
        ctx.sight = sight  # pyright: ignore[reportAttributeAccessIssue]
        laid = _lay_out(q, k, v, checkpoint_k, checkpoint_v)
        mixed = laid.queries.new_empty(*laid.queries.shape[:-1], v.shape[-1])
        with without_autocast(q):
            for tile in _tiles(laid, sight):
                share = _shares(laid, sight, tile)
                part = share[..., 1:] @ laid.checkpoint_values[tile.rows, :, tile.checkpoints]
                part += share[..., :1] * _own(laid.values, laid, tile)
                mixed[tile.rows, :, tile.queries] = part.unflatten(2, (-1, mixed.shape[3]))
        return _tokens_first(mixed).to(q.dtype)

    @staticmethod
    @differentiated_once("checkpoint_attention")
    def backward(ctx: BackwardCFunction, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, checkpoint_k, checkpoint_v = list(ctx.saved_tensors)
        sight = ctx.sight  # pyright: ignore[reportAttributeAccessIssue]
        laid = _lay_out(q, k, v, checkpoint_k, checkpoint_v)
        d_mixed = _heads_first(d_mixed.to(laid.queries.dtype), k.shape[2])
        d = _Laid(*(torch.zeros_like(x) for x in laid))
        with without_autocast(q):
            for tile in _tiles(laid, sight):
                _add_gradients(d, d_mixed, laid, tile, _shares(laid, sight, tile))
        return (
            (_tokens_first(d.queries) * q.shape[-1] ** -0.5).to(q.dtype),
            d.keys.transpose(1, 2).to(k.dtype),
            d.values.transpose(1, 2).to(v.dtype),
            d.checkpoint_keys.transpose(1, 2).to(checkpoint_k.dtype),
            d.checkpoint_values.transpose(1, 2).to(checkpoint_v.dtype),
            None,
        )


class _Spans(NamedTuple):
    """The range of checkpoints, first to past - 1, by row (or one for all) and run of queries."""

    first: list[list[int]]
    past: list[list[int]]


class _Laid(NamedTuple):
    """Scaled queries, keys and values, heads before tokens; R query heads share a key head."""

    queries: Float[Tensor, "B G L R P"]
    keys: Float[Tensor, "B G L P"]
    values: Float[Tensor, "B G L Q"]
    checkpoint_keys: Float[Tensor, "B G S P"]
    checkpoint_values: Float[Tensor, "B G S Q"]


class _Tile(NamedTuple):
    """The rows and queries of a tile, and the checkpoints that any of them sees."""

    rows: slice
    queries: slice
    checkpoints: slice


def _tiles(laid: _Laid, sight: Segments | Places) -> Iterator[_Tile]:
    """Cut the work into tiles of about `TILE` scores, without checkpoints that no query sees."""
    B, G, L, R, _ = laid.queries.shape
    scores = max(1, G * R * laid.checkpoint_keys.shape[2])
    length = min(L, max(SHORTEST, min(LONGEST, TILE // scores)))
    rows = max(1, TILE // (scores * length))
    first, past = sight.spans(L, length)
    for row in range(0, B, rows):
        of = slice(row, row + rows) if len(first) > 1 else slice(0, 1)
        for number, begin in enumerate(range(0, L, length)):
            low = min(span[number] for span in first[of])
            high = max(span[number] for span in past[of])
            # Never reversed, where no query of the run sees a checkpoint: `visible` counts over it.
            queries, seen = slice(begin, min(begin + length, L)), slice(low, max(low, high))
            yield _Tile(slice(row, row + rows), queries, seen)


def _shares(laid: _Laid, sight: Segments | Places, tile: _Tile) -> Float[Tensor, "B G LR K"]:
    """The probability of each query's own key, then of each checkpoint."""
    rows = _rows(laid.queries, tile)
    scores = rows @ laid.checkpoint_keys[tile.rows, :, tile.checkpoints].mT
    by_query = scores.unflatten(2, (-1, laid.queries.shape[3]))
    by_query.masked_fill_(~sight.visible(*tile, rows)[:, None, :, None], -math.inf)
    own = (rows * _own(laid.keys, laid, tile)).sum(-1, keepdim=True)
    return torch.softmax(torch.cat([own, scores], dim=-1), dim=-1)


def _add_gradients(d: _Laid, d_mixed: Tensor, laid: _Laid, tile: _Tile, share: Tensor) -> None:
    at, seen = (tile.rows, slice(None), tile.queries), (tile.rows, slice(None), tile.checkpoints)
    rows, d_rows = _rows(laid.queries, tile), _rows(d_mixed, tile)
    keys, values = _own(laid.keys, laid, tile), _own(laid.values, laid, tile)
    others = d_rows @ laid.checkpoint_values[seen].mT
    d_share = torch.cat([(d_rows * values).sum(-1, keepdim=True), others], dim=-1)
    # The softmax gradient, in place: dS = P * (dP - rowsum(P * dP)).
    d_score = d_share.sub_((d_share * share).sum(-1, keepdim=True)).mul_(share)
    R = laid.queries.shape[3]
    # The scale of the scores is in the laid-out queries; the caller applies it to their gradient.
    d_queries = d_score[..., 1:] @ laid.checkpoint_keys[seen] + d_score[..., :1] * keys
    d.queries[at] = d_queries.unflatten(2, (-1, R))
    d.keys[at] = (d_score[..., :1] * rows).unflatten(2, (-1, R)).sum(3)
    d.values[at] = (share[..., :1] * d_rows).unflatten(2, (-1, R)).sum(3)
    # Several tiles see a checkpoint, so these add up; a query is in one tile only.
    d.checkpoint_keys[seen] += d_score[..., 1:].mT @ rows
    d.checkpoint_values[seen] += share[..., 1:].mT @ d_rows


def _rows(x: Tensor, tile: _Tile) -> Float[Tensor, "B G LR P"]:
    return x[tile.rows, :, tile.queries].flatten(2, 3)


def _own(x: Tensor, laid: _Laid, tile: _Tile) -> Float[Tensor, "B G LR P"]:
    """The own key or value of each query of the tile."""
    return x[tile.rows, :, tile.queries].repeat_interleave(laid.queries.shape[3], dim=2)


def _lay_out(q: Tensor, k: Tensor, v: Tensor, checkpoint_k: Tensor, checkpoint_v: Tensor) -> _Laid:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    keyed = (x.to(accumulator).transpose(1, 2) for x in (k, v, checkpoint_k, checkpoint_v))
    queries = _heads_first(q.to(accumulator) * q.shape[-1] ** -0.5, k.shape[2])
    return _Laid(queries, *(x.contiguous() for x in keyed))


def _heads_first(x: Tensor, groups: int) -> Float[Tensor, "B G L R P"]:
    return x.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4).contiguous()


def _tokens_first(x: Float[Tensor, "B G L R P"]) -> Float[Tensor, "B L H P"]:
    return x.permute(0, 2, 1, 3, 4).flatten(2, 3)
