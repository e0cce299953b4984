"""HiP's search: selects the key blocks that each query block reads, without scoring every key.

Sources: Lee et al. 2024, "HiP Attention", algorithm 1 (tree search); Lee et al. 2025,
"InfiniteHiP", section 3.1 (staged pruning). Changed: a range is represented by its centre, and ties
go to the earlier range, so that the search is deterministic; all rows of a query block vote; each
query head selects for itself; documents are searched separately.

On a GPU a Triton kernel scores the ranges of a round, and torch sorts the scores. By count, a layer
of 16 heads at 8 x 2,048 tokens with 512 kept keys of 64 channels in bf16 and two rounds moves 0.10
TB, mostly tables of indices, and launches some 4,000 kernels (0.58 TB and 22,000 if torch gathers
the keys). This was not timed on a GPU.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.attention.block_sparse_attention import QueryBlocks, in_one_list, take, tiles
from kernels.dispatch import define_operator, uses_triton
from kernels.precision import without_autocast

TABLES = 16
"""Float32 numbers that a round is assumed to hold per key: about eight tables of indices."""


class Search(NamedTuple):
    """Sizes of a search.

    Attributes:
        kept: key blocks on each list.
        key_block: keys per block.
        longest: keys of the longest document, or an upper bound.
        exact: score ranges by all of their keys, for tests.
    """

    kept: int
    key_block: int
    longest: int
    exact: bool


class Stage(NamedTuple):
    """One stage of pruning: key blocks per chunk, and number of chunks to keep."""

    chunk: int
    keep: int


class Region(NamedTuple):
    """The keys that stages search: not the sinks, nor keys in the window of every served row.

    Attributes:
        n_sink: sinks, keys at the beginning of the document.
        window: last keys, which a row sees anyway.
        served: least number of rows, from a block's first on, that use its list.
    """

    n_sink: int
    window: int
    served: int


Judge: TypeAlias = Callable[[Int[Tensor, "M J"], Int[Tensor, "M J"]], Float[Tensor, "M J"]]
"""Maps begins and ends of ranges of keys to scores; ranges may be empty."""


@torch.no_grad()
def tree_search(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    blocks: QueryBlocks,
    search: Search,
) -> Int[Tensor, "B H N K"]:
    """Select `search.kept` key blocks for each query block by halving that many ranges.

    Searches all keys up to the block's last row. A list holds all blocks if they fit, padded with
    -1. Scores about 2 kept log2(blocks / kept) blocks.
    """
    rounds = _halvings(math.ceil(search.longest / search.key_block), search.kept)
    judged = search.longest if search.exact else 2 * search.kept * search.key_block
    parts = _cut(queries, keys, blocks, judged * _held(queries))
    lists = [_descend(tile, search, rounds) for tile in parts]
    return torch.cat(lists).view(queries.shape[0], queries.shape[2], -1, search.kept)


@torch.no_grad()
def staged_search(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    blocks: QueryBlocks,
    search: Search,
    stages: tuple[Stage, ...],
    region: Region,
) -> Int[Tensor, "B H N K"]:
    """Select `search.kept` key blocks for each query block by pruning shorter and shorter chunks.

    The first stage scores every chunk of the region, so work is queries times keys over the length
    of its chunks.

    Args:
        queries: queries of the last L of the S tokens.
        keys: one per token.
        blocks: which queries select together.
        search: sizes.
        stages: stages in order; each chunk length is a multiple of the next, and the last is 1.
        region: the keys to search.
    """
    judged = search.longest if search.exact else max(_candidates(search, stages))
    parts = _cut(queries, keys, blocks, judged * _held(queries))
    lists = [_prune(tile, search, stages, region) for tile in parts]
    return torch.cat(lists).view(queries.shape[0], queries.shape[2], -1, search.kept)


def tree_keys_scored(positions: Int[Tensor, " L"], kept: int, key_block: int) -> Int[Tensor, " L"]:
    """The most keys that the tree search scores for a row at each position."""
    n_blocks = positions // key_block + 1
    ratio = (n_blocks + kept - 1) // kept
    # The bit length of ratio - 1 is the number of halvings that bring it to one.
    rounds = torch.frexp((ratio - 1).double()).exponent
    return 2 * kept * key_block * rounds.to(positions.dtype)


def staged_keys_scored(
    positions: Int[Tensor, " L"], key_block: int, stages: tuple[Stage, ...], region: Region
) -> Int[Tensor, " L"]:
    """The most keys that the staged search scores for a row at each position."""
    low = region.n_sink
    last = torch.minimum(positions, positions + region.served - 1 - region.window)
    scored = torch.zeros_like(positions)
    survivors = torch.zeros_like(positions)
    for number, (chunk, keep) in enumerate(stages):
        length = chunk * key_block
        there = (torch.div(last, length, rounding_mode="floor") - low // length + 1).clamp(min=0)
        there = torch.where(last >= low, there, 0)
        ratio = stages[number - 1].chunk // chunk
        chunks = there if number == 0 else torch.minimum(there, survivors * ratio)
        scored += chunks * max(1, 2 * math.ceil(math.log2(length)))
        survivors = chunks.clamp(max=keep)
    return scored


@torch.no_grad()
def recall_at_k(
    queries: Float[Tensor, "B L H P"],
    keys: Float[Tensor, "B S G P"],
    kept: Int[Tensor, "B H N K"],
    blocks: QueryBlocks,
    key_block: int,
) -> Float[Tensor, "B H L"]:
    """Share of each query's best keys, as many as a list holds, that are on its list.

    Scores every key.
    """
    B, L, H, _ = queries.shape
    parts = list(_cut(queries, keys, blocks, keys.shape[1] * keys.shape[3]))
    lists = kept.flatten(0, 2).split([len(tile.queries) for tile in parts])
    shares = [
        _found(tile, own, keys.shape[1], key_block) for tile, own in zip(parts, lists, strict=True)
    ]
    rows = torch.cat(shares).view(B, H, -1)
    return torch.gather(rows, 2, blocks.places[:, None].expand(B, H, L))


class _QueryBlockTile(NamedTuple):
    """Query blocks, each of one head; key t of a block is row `begins + stride * t` of `keys`."""

    queries: Float[Tensor, "M R P"]
    keys: Float[Tensor, "X P"]
    positions: Int[Tensor, "M R"]
    begins: Int[Tensor, " M"]
    stride: int


def _held(queries: Tensor) -> int:
    """Numbers held per scored key: its channels, or tables of indices with the Triton kernel."""
    return TABLES if uses_triton(queries) else queries.shape[3]


def _cut(
    queries: Tensor, keys: Tensor, blocks: QueryBlocks, each: int
) -> Iterator[_QueryBlockTile]:
    """Tiles of as many query blocks as fit the gather limit at `each` numbers per block."""
    listed, where = in_one_list(queries, keys, blocks)
    flat = keys.reshape(-1, keys.shape[-1])
    for part in tiles(len(listed), each, keys.device):
        yield _QueryBlockTile(
            listed[part], flat, where.positions[part], where.begins[part], where.stride
        )


def _descend(tile: _QueryBlockTile, search: Search, rounds: int) -> Int[Tensor, "M K"]:
    """Tree search: split every range, keep the best halves, until each holds one block."""
    n_blocks = tile.positions[:, -1:] // search.key_block + 1
    number = torch.arange(search.kept, device=n_blocks.device)
    few = n_blocks <= search.kept
    begin = torch.where(few, number.minimum(n_blocks), number * n_blocks // search.kept)
    after = number + 1
    end = torch.where(few, after.minimum(n_blocks), after * n_blocks // search.kept)
    judge = _every_key(tile, search.longest) if search.exact else _centre(tile, search.key_block)
    for _ in range(rounds):
        # The first half is the longer one; of a single block the second half is empty.
        middle = (begin + end + 1) // 2
        begins = torch.stack([begin, middle], dim=2).flatten(1)
        ends = torch.stack([middle, end], dim=2).flatten(1)
        scores = judge(begins * search.key_block, ends * search.key_block)
        best = _strongest(scores, begins < ends, search.kept)
        begin, end = torch.gather(begins, 1, best), torch.gather(ends, 1, best)
    return torch.where(begin < end, begin, -1)


def _prune(
    tile: _QueryBlockTile, search: Search, stages: tuple[Stage, ...], region: Region
) -> Int[Tensor, "M K"]:
    """Staged search: score every chunk, keep the best, split them for the next stage."""
    last = tile.positions[:, -1:]
    # Keys after `high` are in the window of every row that uses the list.
    served = torch.maximum(last, tile.positions[:, :1] + region.served - 1)
    high = torch.minimum(last, served - region.window) + 1
    before = stages[0].chunk
    chunks = torch.arange(math.ceil(search.longest / (before * search.key_block)))
    chunks = chunks.to(last.device).expand(len(last), -1)
    inside = torch.ones_like(chunks, dtype=torch.bool)
    exact = _every_key(tile, search.longest) if search.exact else None
    for chunk, keep in stages:
        length = chunk * search.key_block
        pieces = torch.arange(before // chunk, device=last.device)
        chunks = (chunks[:, :, None] * (before // chunk) + pieces).flatten(1)
        begins = (chunks * length).clamp(min=region.n_sink)
        ends = ((chunks + 1) * length).minimum(high).maximum(begins)
        judge = exact or _halving(tile, length)
        best = _strongest(judge(begins, ends), begins < ends, keep)
        chunks = torch.gather(chunks, 1, best)
        inside, before = torch.gather(begins < ends, 1, best), chunk
    # Blocks are in order, existing ones first, so only empty entries are cut off.
    kept = torch.where(inside, chunks, -1)[:, : search.kept]
    return F.pad(kept, (0, search.kept - kept.shape[1]), value=-1)


def _strongest(
    scores: Float[Tensor, "M J"], exists: Bool[Tensor, "M J"], kept: int
) -> Int[Tensor, "M K"]:
    """Indices of the best ranges, in order of position; ties go to the earlier range."""
    ordered = scores.masked_fill(~exists, -torch.inf).sort(dim=1, descending=True, stable=True)
    return ordered.indices[:, :kept].sort(dim=1).values


def _best_scores(
    tile: _QueryBlockTile, firsts: Int[Tensor, "M J"], width: int = 1
) -> Float[Tensor, "M J"]:
    """The largest product of any of `width` keys from each position on with a row that sees it."""
    if uses_triton(tile.queries):
        tensors = (tile.queries, tile.keys, tile.positions.int(), tile.begins, firsts.int())
        return _scores(*(x.contiguous() for x in tensors), tile.stride, width)
    places = (firsts[:, :, None] + torch.arange(width, device=firsts.device)).flatten(1)
    address = tile.begins[:, None] + tile.stride * places.clamp(min=0).minimum(
        tile.positions[:, -1:]
    )
    keys = take(tile.keys, address)
    with without_autocast(keys):
        scores = tile.queries.to(keys.dtype) @ keys.mT
    hidden = places[:, None] > tile.positions[:, :, None]
    best = scores.masked_fill(hidden, -torch.inf).amax(dim=1)
    return best.unflatten(1, (-1, width)).amax(dim=2)


def _centre(tile: _QueryBlockTile, key_block: int) -> Judge:
    """Score ranges of whole blocks by the keys of their central block."""

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        centre = (begins // key_block + ends // key_block - 1) // 2
        return _best_scores(tile, centre * key_block, key_block)

    return judge


def _halving(tile: _QueryBlockTile, length: int) -> Judge:
    """Score ranges of at most `length` keys by the key at which repeated halving ends."""

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        if length == 1:
            return _best_scores(tile, begins)
        scores = torch.full_like(begins, -torch.inf, dtype=tile.queries.dtype)
        for _ in range(_halvings(length, 1)):
            middle = (begins + ends + 1) // 2
            left = _best_scores(tile, (begins + middle - 1) // 2)
            right = _best_scores(tile, (middle + ends - 1) // 2)
            later = (right > left) & (middle < ends)
            begins, ends = torch.where(later, middle, begins), torch.where(later, ends, middle)
            scores = torch.where(later, right, left)
        return scores

    return judge


def _every_key(tile: _QueryBlockTile, longest: int) -> Judge:
    """Score ordered ranges by all of their keys."""
    places = torch.arange(longest, device=tile.positions.device).expand(len(tile.positions), -1)
    scores = _best_scores(tile, places)

    def judge(begins: Int[Tensor, "M J"], ends: Int[Tensor, "M J"]) -> Float[Tensor, "M J"]:
        after = torch.searchsorted(begins.contiguous(), places.contiguous(), right=True)
        owner = (after - 1).clamp(min=0)
        inside = (after > 0) & (places < torch.gather(ends, 1, owner))
        best = torch.full_like(begins, -torch.inf, dtype=scores.dtype)
        return best.scatter_reduce(1, owner, scores.masked_fill(~inside, -torch.inf), "amax")

    return judge


def _found(
    tile: _QueryBlockTile, lists: Int[Tensor, "M K"], longest: int, key_block: int
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


def _halvings(length: int, parts: int) -> int:
    """Halvings that reduce `length`, cut into `parts`, to lengths of one."""
    return max(0, math.ceil(length / parts) - 1).bit_length()


def _candidates(search: Search, stages: tuple[Stage, ...]) -> list[int]:
    """The most chunks that each stage scores."""
    counts = [math.ceil(search.longest / (stages[0].chunk * search.key_block))]
    for before, stage in itertools.pairwise(stages):
        counts.append(min(counts[-1], before.keep) * (before.chunk // stage.chunk))
    return counts


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
