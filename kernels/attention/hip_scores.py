"""Scores of ranges of keys in HiP's search: which keys stand for a range.

Sources: Lee et al. 2024, "HiP Attention", algorithm 1 (a range by its centre); Lee et al. 2025,
"InfiniteHiP", section 3.1 (by the key at which repeated halving ends). Changed: the centre also
stands for each half, for which InfiniteHiP takes the first key; ties go to the earlier half; all
rows of a query block vote.

On a GPU a Triton kernel multiplies the keys, and no gathered keys are stored.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.block_sparse_attention import QueryBlocks, in_one_list, take, tiles
from kernels.dispatch import define_operator, uses_triton
from kernels.precision import without_autocast

TABLES = 16
"""Float32 numbers that a round is assumed to hold per key: about eight tables of indices."""

Judge: TypeAlias = Callable[[Int[Tensor, "M J"], Int[Tensor, "M J"]], Float[Tensor, "M J"]]
"""Maps begins and ends of ranges of keys to scores; ranges may be empty."""


class QueryBlockTile(NamedTuple):
    """Query blocks, each of one head; key t of a block is row `begins + stride * t` of `keys`."""

    queries: Float[Tensor, "M R P"]
    keys: Float[Tensor, "X P"]
    positions: Int[Tensor, "M R"]
    begins: Int[Tensor, " M"]
    stride: int


def held_per_key(queries: Tensor) -> int:
    """Numbers held per scored key: its channels, or tables of indices with the Triton kernel."""
    return TABLES if uses_triton(queries) else queries.shape[3]


def cut_into_tiles(
    queries: Tensor, keys: Tensor, blocks: QueryBlocks, each: int
) -> Iterator[QueryBlockTile]:
    """Tiles of as many query blocks as fit the gather limit at `each` numbers per block."""
    listed, where = in_one_list(queries, keys, blocks)
    flat = keys.reshape(-1, keys.shape[-1])
    for part in tiles(len(listed), each, keys.device):
        yield QueryBlockTile(
            listed[part], flat, where.positions[part], where.begins[part], where.stride
        )


def by_centre(tile: QueryBlockTile, key_block: int) -> Judge:
    """Score ranges of whole blocks by the keys of their central block."""

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        centre = (begins // key_block + ends // key_block - 1) // 2
        return _best_scores(tile, centre * key_block, key_block)

    return judge


def by_halving(tile: QueryBlockTile, length: int) -> Judge:
    """Score ranges of at most `length` keys by the key at which repeated halving ends."""

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        if length == 1:
            return _best_scores(tile, begins)
        scores = torch.full_like(begins, -torch.inf, dtype=tile.queries.dtype)
        for _ in range(halvings(length, 1)):
            middle = (begins + ends + 1) // 2
            left = _best_scores(tile, (begins + middle - 1) // 2)
            right = _best_scores(tile, (middle + ends - 1) // 2)
            # On equal scores the left half stays; a range of one key has no right half.
            later = (right > left) & (middle < ends)
            begins, ends = torch.where(later, middle, begins), torch.where(later, ends, middle)
            scores = torch.where(later, right, left)
        return scores

    return judge


def by_every_key(tile: QueryBlockTile, longest: int) -> Judge:
    """Score ordered ranges by all of their keys."""
    places = torch.arange(longest, device=tile.positions.device).expand(len(tile.positions), -1)
    scores = _best_scores(tile, places)

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        # Begins ascend, so the range that may own a key is the last one that begins at or before
        # it.
        after = torch.searchsorted(begins.contiguous(), places.contiguous(), right=True)
        owner = (after - 1).clamp(min=0)
        inside = (after > 0) & (places < torch.gather(ends, 1, owner))
        best = torch.full_like(begins, -torch.inf, dtype=scores.dtype)
        return best.scatter_reduce(1, owner, scores.masked_fill(~inside, -torch.inf), "amax")

    return judge


def halvings(length: int, parts: int) -> int:
    """Halvings that reduce `length`, cut into `parts`, to lengths of one."""
    return max(0, math.ceil(length / parts) - 1).bit_length()


def _best_scores(
    tile: QueryBlockTile, firsts: Int[Tensor, "M J"], width: int = 1
) -> Float[Tensor, "M J"]:
    """The largest product of any of `width` keys from each position on with a row that sees it."""
    if uses_triton(tile.queries):
        tensors = (tile.queries, tile.keys, tile.positions.int(), tile.begins, firsts.int())
        return _scores(*(x.contiguous() for x in tensors), tile.stride, width)
    places = (firsts[:, :, None] + torch.arange(width, device=firsts.device)).flatten(1)
    # Clamped for a valid address: later keys are masked below, empty ranges by the caller.
    address = tile.begins[:, None] + tile.stride * places.clamp(min=0).minimum(
        tile.positions[:, -1:]
    )
    keys = take(tile.keys, address)
    with without_autocast(keys):
        scores = tile.queries.to(keys.dtype) @ keys.mT
    hidden = places[:, None] > tile.positions[:, :, None]
    best = scores.masked_fill(hidden, -torch.inf).amax(dim=1)
    return best.unflatten(1, (-1, width)).amax(dim=2)


def share_on_list(
    tile: QueryBlockTile, lists: Int[Tensor, "M K"], longest: int, key_block: int
) -> Float[Tensor, "M R"]:
    """Share of each row's best keys, as many as its list holds, that are on the list."""
    places = torch.arange(longest, device=lists.device)
    address = tile.begins[:, None] + tile.stride * places.minimum(tile.positions[:, -1:])
    keys = take(tile.keys, address)
    rows = tile.positions[:, :, None]
    with without_autocast(keys):
        scores = tile.queries.to(keys.dtype) @ keys.mT
    scores = scores.masked_fill(places > rows, -torch.inf)
    best = scores.topk(min(longest, lists.shape[1] * key_block), dim=2).indices
    seen = best <= rows
    n_blocks = math.ceil(longest / key_block)
    # An additional column takes empty entries.
    on_list = torch.zeros(len(lists), n_blocks + 1, dtype=torch.bool, device=lists.device)
    on_list.scatter_(1, torch.where(lists < 0, n_blocks, lists).long(), value=True)
    found = torch.gather(on_list, 1, (best // key_block).flatten(1)).view(best.shape) & seen
    return found.sum(dim=2) / seen.sum(dim=2)


def _scores_shape(
    q: Tensor,
    _k: Tensor,
    _positions: Tensor,
    _begins: Tensor,
    firsts: Tensor,
    _stride: int,
    _width: int,
) -> Tensor:
    return q.new_empty(firsts.shape, dtype=torch.float32)


_scores = define_operator(
    "hip_scores(Tensor queries, Tensor keys, Tensor positions, Tensor begins, Tensor firsts, "
    "int stride, int width) -> Tensor",
    _scores_shape,
    "kernels.attention.hip_scores_triton:forward",
)
