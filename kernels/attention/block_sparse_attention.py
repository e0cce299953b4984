"""Softmax attention of query blocks to listed key blocks, sink tokens and a sliding window.

Source: Lee et al. 2024, "HiP Attention", section 3.3; Xiao et al. 2023, "StreamingLLM", section 3.2
(sinks). A key that is listed, a sink and in the window counts once. A window of W is W keys, the
query's own included. Changed: forward and backward gather the keys of a bounded number of query
blocks at a time, so that no memory grows with queries times keys. The Triton kernels of
`block_sparse_operator` compute the same without storing gathered keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.attention.block_sparse_operator import BlockSparseSizes, attend_to_lists
from kernels.derivatives import differentiated_once, in_plain_torch
from kernels.dispatch import uses_triton
from kernels.precision import without_autocast

# Key elements gathered at a time: 2 MiB of float32, about a core's share of the last-level cache.
GATHERED = 1 << 19
# The same on a GPU, where launches cost more than memory traffic: 256 MiB of float32.
GATHERED_ON_GPU = 1 << 26


class QueryBlocks(NamedTuple):
    """Blocks of queries of one document, which share a list of key blocks.

    Attributes:
        rows: index of each query of a block; a shorter block repeats its last query.
        places: index of each query in the flattened `rows`.
        positions: position of each of `rows` in its document.
        begins: index of the first key of the block's document.
    """

    rows: Int[Tensor, "B N R"]
    places: Int[Tensor, "B L"]
    positions: Int[Tensor, "B N R"]
    begins: Int[Tensor, "B N"]

    def first_rows(self) -> "QueryBlocks":
        """The blocks reduced to their first query; `places` still refers to whole blocks."""
        return self._replace(rows=self.rows[:, :, :1], positions=self.positions[:, :, :1])

    def split(self, n: int) -> tuple["QueryBlocks", "QueryBlocks"]:
        """The first `n` blocks of each row, and the rest; `places` still refers to all."""
        parts = zip(*(x.tensor_split([n], dim=1) for x in (self.rows, self.positions)), strict=True)
        begins = self.begins.tensor_split([n], dim=1)
        first, others = (
            QueryBlocks(rows, self.places, positions, begin)
            for (rows, positions), begin in zip(parts, begins, strict=True)
        )
        return first, others

    def last(self, kept: Int[Tensor, "B H N K"]) -> Int[Tensor, "B H K"]:
        """The list of the block that holds each row's last query."""
        last = self.places[:, -1] // self.rows.shape[2]
        return kept[torch.arange(len(last), device=last.device), :, last]


class BlockSparsity(NamedTuple):
    """The size of listed key blocks, and the keys that every query sees.

    Attributes:
        key_block: keys per block; block c holds keys c * key_block to (c + 1) * key_block - 1 of
            the document.
        n_sink: number of sinks, keys at the beginning of the document.
        window: last keys, the query's own included; at least 1.
    """

    key_block: int
    n_sink: int
    window: int


class Where(NamedTuple):
    """Positions of the query blocks of all rows and heads; key t is row `begins + stride * t`."""

    positions: Int[Tensor, "M R"]
    begins: Int[Tensor, " M"]
    stride: int


def query_blocks(positions: Int[Tensor, "B L"], keys: int, width: int, finish: int) -> QueryBlocks:
    """Cut queries into blocks that begin at multiples of `width` in their document.

    Args:
        positions: place of each query in its document.
        keys: number of keys; the last of them are the queries' own.
        width: queries of a whole block.
        finish: where a block that began before the first query is cut: at multiples of this.
    """
    B, L = positions.shape
    index = torch.arange(L, device=positions.device).expand(B, L)
    rows, places = index[:, :, None], index
    if width > 1:
        starts = positions % width == 0
        begun = ~(starts.cumsum(dim=1) > 0)
        starts = starts | (begun & (positions % finish == 0))
        # The first query begins a block even in the middle of one: earlier queries are not here.
        starts[:, 0] = True
        rows, places = _rows(starts, min(width, L))
    here = torch.gather(positions, 1, rows.flatten(1)).view(rows.shape)
    # Query row i is key S - L + i of its row; its position back from there is where keys begin.
    return QueryBlocks(rows, places, here, keys - L + rows[..., 0] - here[..., 0])


def block_sparse_attention(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    kept: Int[Tensor, "B H N K"],
    blocks: QueryBlocks,
    reach: BlockSparsity,
) -> Float[Tensor, "B L H Q"]:
    """Causal attention of each query to its block's listed keys, the sinks and the window.

    Scores are scaled by 1/sqrt(P) and normalised in float32 (float64 in, float64 out); outputs have
    the dtype of `values`. Lists get no gradient. Deterministic, except in float64 on a GPU, where
    torch sums the gradients of keys and values in arbitrary order.

    Args:
        queries: queries of the last L of the S tokens.
        keys: one per token; query head h reads key head h // (H / G).
        values: one per token.
        kept: the listed key blocks of each query block, in any order; duplicates count once, and -1
            is an empty entry.
        blocks: which queries share a list.
        reach: the size of key blocks, and the sinks and window.

    Raises:
        ValueError: the window is empty, or there are fewer keys than queries or other values.
    """
    _check(queries, keys, values, reach)
    if in_plain_torch():
        return block_sparse_attention_reference(queries, keys, values, kept, blocks, reach)
    B, L, H, _ = queries.shape
    S, G, Q = values.shape[1:]
    listed, where = in_one_list(queries, keys, blocks)
    reach = BlockSparsity(reach.key_block, min(reach.n_sink, S), min(reach.window, S))
    tensors = (listed, keys.reshape(B * S * G, -1), values.reshape(B * S * G, Q))
    lists = _distinct(kept.flatten(0, 2))
    if uses_triton(queries):
        mixed = attend_to_lists(*tensors, lists, where[:2], BlockSparseSizes(B, H, G, *reach))
    else:
        mixed = _BlockSparse.apply(*tensors, lists, where, reach)
    rows = mixed.view(B, H, -1, Q).transpose(1, 2).flatten(0, 1)
    # Back to one row per query: the repeats that fill short blocks are dropped here.
    first = torch.arange(B, device=rows.device)[:, None] * (rows.shape[0] // B)
    return rows.index_select(0, (blocks.places + first).flatten()).view(B, L, H, Q)


def block_sparse_attention_reference(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    values: Float[Tensor, "B S G Q"],
    kept: Int[Tensor, "B H N K"],
    blocks: QueryBlocks,
    reach: BlockSparsity,
) -> Float[Tensor, "B L H Q"]:
    """Compute `block_sparse_attention` with a dense mask."""
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2).to(queries.dtype),
        values.transpose(1, 2).to(queries.dtype),
        attn_mask=visible_keys(kept, keys.shape[1], blocks, reach),
        enable_gqa=keys.shape[2] != queries.shape[2],
    )
    return mixed.transpose(1, 2).to(values.dtype)


def visible_keys(
    kept: Int[Tensor, "B H N K"], keys: int, blocks: QueryBlocks, reach: BlockSparsity
) -> Bool[Tensor, "B H L S"]:
    """The dense mask of the keys that each query sees, for references and figures."""
    index = torch.arange(keys, device=kept.device)
    place = index - blocks.begins[:, :, None]  # (B, N, S)
    listed = (place[:, None, :, None] // reach.key_block == kept[..., None]) & (
        kept[..., None] >= 0
    )
    chosen = listed.any(dim=3)[:, :, :, None]
    place, row = place[:, None, :, None], blocks.positions[:, None, :, :, None]
    seen = chosen | (place < reach.n_sink) | (place > row - reach.window)
    seen = (seen & (place >= 0) & (place <= row)).flatten(2, 3)  # (B, H, N R, S)
    at = blocks.places[:, None, :, None].expand(*seen.shape[:2], -1, keys)
    return torch.gather(seen, 2, at)


def in_one_list(
    queries: Float[Tensor, "B L H P"], keys: Float[Tensor, "B S G P"], blocks: QueryBlocks
) -> tuple[Float[Tensor, "M R P"], Where]:
    """Flatten the query blocks of all rows and heads, ordered by row, then head."""
    B, L, H, P = queries.shape
    S, G = keys.shape[1:3]
    N, R = blocks.rows.shape[1:]
    row = torch.arange(B, device=queries.device)
    picked = (blocks.rows + L * row[:, None, None]).flatten()
    blocked = queries.flatten(0, 1).index_select(0, picked).view(B, N, R, H, P)
    head = torch.arange(H, device=queries.device) // (H // G)
    # Flat row of a key: (its row of the batch * S + its index) * G + its head.
    begins = (blocks.begins + S * row[:, None])[:, None] * G + head[:, None]
    positions = blocks.positions[:, None].expand(B, H, N, R).reshape(B * H * N, R)
    listed = blocked.permute(0, 3, 1, 2, 4).reshape(B * H * N, R, P)
    return listed, Where(positions, begins.flatten(), G)


def tiles(items: int, each: int, device: torch.device) -> Iterator[slice]:
    """Slices of as many items as fit the gather limit at `each` elements per item."""
    most = GATHERED if device.type == "cpu" else GATHERED_ON_GPU
    size = max(1, most // max(1, each))
    return (slice(begin, begin + size) for begin in range(0, items, size))


def take(rows: Float[Tensor, "X P"], index: Int[Tensor, "M J"]) -> Float[Tensor, "M J P"]:
    """Gather rows, in float32 or wider."""
    taken = rows.index_select(0, index.flatten()).view(*index.shape, -1)
    return taken.to(torch.promote_types(rows.dtype, torch.float32))


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: Float[Tensor, "M R P"],
        keys: Float[Tensor, "X P"],
        values: Float[Tensor, "X Q"],
        kept: Int[Tensor, "M K"],
        where: Where,
        reach: BlockSparsity,
    ) -> Float[Tensor, "M R Q"]:
        inputs = _Inputs(queries, keys, values, kept, where, reach)
        wide = torch.promote_types(queries.dtype, torch.float32)
        mixed = values.new_empty(*queries.shape[:2], values.shape[1])
        totals = queries.new_empty(queries.shape[:2], dtype=wide)
        with without_autocast(queries):
            for tile in _tiles(inputs):
                gathered, scores = _score(inputs, tile)
                totals[tile] = scores.logsumexp(dim=-1)
                share = torch.exp(scores - totals[tile, :, None])
                mixed[tile] = (share @ gathered.values).to(values.dtype)
        ctx.save_for_backward(*inputs[:4], *where[:2], mixed, totals)
        ctx.sizes = where.stride, reach  # pyright: ignore[reportAttributeAccessIssue]
        return mixed

    @staticmethod
    @differentiated_once("block_sparse_attention")
    def backward(ctx: BackwardCFunction, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, kept, positions, begins, mixed, totals = list(ctx.saved_tensors)
        stride, reach = ctx.sizes  # pyright: ignore[reportAttributeAccessIssue]
        inputs = _Inputs(queries, keys, values, kept, Where(positions, begins, stride), reach)
        d_queries, d_keys, d_values = (
            torch.zeros_like(x, dtype=totals.dtype) for x in (queries, keys, values)
        )
        with without_autocast(queries):
            for tile in _tiles(inputs):
                (address, k, v), scores = _score(inputs, tile)
                share = torch.exp(scores - totals[tile, :, None])
                d_out = d_mixed[tile].to(share.dtype)
                # The softmax gradient: dS = P * (dP - rowsum(dO * O)) (Dao 2023, algorithm 2).
                carried = (d_out * mixed[tile]).sum(dim=-1, keepdim=True)
                d_scores = share * (d_out @ v.mT - carried) * queries.shape[-1] ** -0.5
                d_queries[tile] = d_scores @ k
                d_k = d_scores.mT @ queries[tile].to(share.dtype)
                d_keys.index_add_(0, address.flatten(), d_k.flatten(0, 1))
                d_values.index_add_(0, address.flatten(), (share.mT @ d_out).flatten(0, 1))
        gradients = zip((d_queries, d_keys, d_values), (queries, keys, values), strict=True)
        return (*(d.to(x.dtype) for d, x in gradients), None, None, None)


class _Inputs(NamedTuple):
    queries: Float[Tensor, "M R P"]
    keys: Float[Tensor, "X P"]
    values: Float[Tensor, "X Q"]
    kept: Int[Tensor, "M K"]
    where: Where
    reach: BlockSparsity


class _GatheredKeys(NamedTuple):
    """Gathered keys and values of a tile, and the rows from which they come."""

    address: Int[Tensor, "M J"]
    keys: Float[Tensor, "M J P"]
    values: Float[Tensor, "M J Q"]


class _Slots(NamedTuple):
    """The keys that a query block gathers, and which rows see them; no row sees a key twice."""

    places: Int[Tensor, "M J"]
    visible: Bool[Tensor, "M R J"]


def _score(inputs: _Inputs, tile: slice) -> tuple[_GatheredKeys, Float[Tensor, "M R J"]]:
    """Gather the keys and values of a tile; scores are -inf where a row does not see a key."""
    where = inputs.where
    at = _slots(inputs.kept[tile], where.positions[tile], inputs.reach)
    address = where.begins[tile, None] + where.stride * at.places
    gathered = _GatheredKeys(address, take(inputs.keys, address), take(inputs.values, address))
    queries = inputs.queries[tile].to(gathered.keys.dtype)
    scores = queries @ gathered.keys.mT * queries.shape[-1] ** -0.5
    return gathered, scores.masked_fill(~at.visible, -torch.inf)


def _slots(kept: Int[Tensor, "M K"], positions: Int[Tensor, "M R"], reach: BlockSparsity) -> _Slots:
    M, R = positions.shape

    def count(n: int) -> Tensor:
        return torch.arange(n, device=kept.device)

    listed = (kept[:, :, None] * reach.key_block + count(reach.key_block)).flatten(1)
    far = torch.cat([listed, count(reach.n_sink).expand(M, -1)], dim=1)
    # Lists, sinks and window may overlap. Each key counts in one of them only: the window first,
    # then the sinks.
    eligible = far >= 0
    eligible[:, : listed.shape[1]] = listed >= reach.n_sink
    left = positions[:, :, None] - reach.window
    # The windows of R consecutive rows together are window + R - 1 keys.
    near = positions[:, :1] - reach.window + 1 + count(reach.window + R - 1)
    in_window = (near[:, None] > left) & (near[:, None] <= positions[:, :, None])
    before_window = eligible[:, None] & (far[:, None] <= left)
    visible = torch.cat([before_window, in_window & (near[:, None] >= 0)], dim=2)
    # A key that no row sees may be in another document and hold a NaN: take the first key instead.
    places = torch.cat([far, near], dim=1)
    return _Slots(torch.where(visible.any(dim=1), places, 0), visible)


def _tiles(inputs: _Inputs) -> Iterator[slice]:
    M, R, P = inputs.queries.shape
    reach = inputs.reach
    slots = inputs.kept.shape[1] * reach.key_block + reach.n_sink + reach.window + R - 1
    each = slots * max(P, R, inputs.values.shape[1])
    return tiles(M, each, inputs.queries.device)


def _rows(starts: Bool[Tensor, "B L"], width: int) -> tuple[Tensor, Tensor]:
    """Index of each query of each block, and of each query in the flattened blocks."""
    B, L = starts.shape
    block = starts.cumsum(dim=1) - 1
    N = -(-L // width) if starts.is_meta else int(block[:, -1].max()) + 1
    number = torch.arange(N, device=starts.device).expand(B, N).contiguous()
    first = torch.searchsorted(block, number)
    last = torch.searchsorted(block, number, right=True) - 1
    within = torch.arange(width, device=starts.device)
    rows = torch.minimum(first[..., None] + within, last[..., None])
    # A query's place is its block's first place plus its offset in the block.
    index = torch.arange(L, device=starts.device)
    return rows, block * width + index - torch.gather(first, 1, block)


def _distinct(kept: Int[Tensor, "M K"]) -> Int[Tensor, "M K"]:
    """Sort each list, and replace duplicates by -1."""
    ordered = kept.sort(dim=1).values.long()
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again, -1)


def _check(queries: Tensor, keys: Tensor, values: Tensor, reach: BlockSparsity) -> None:
    if reach.window < 1 or keys.shape[1] < queries.shape[1] or keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"window {reach.window} with {queries.shape[1]} queries on keys of shape "
            f"{tuple(keys.shape)} and values of shape {tuple(values.shape)}; take a window of at "
            "least 1, at least as many keys as queries, and one value per key"
        )
