"""HiP's search: selects the key blocks that each query block reads, without scoring every key.

Sources: Lee et al. 2024, "HiP Attention", algorithm 1 (tree search); Lee et al. 2025,
"InfiniteHiP", section 3.1 (staged pruning). Changed: ties go to the earlier range, so that the
search is deterministic; each query head selects for itself; documents are searched separately. How
a range is scored is in `hip_scores`.

On a GPU a Triton kernel scores the ranges of a round, and torch sorts the scores. By count, a layer
of 16 heads at 8 x 2,048 tokens with 512 kept keys of 64 channels in bf16 and two rounds moves 0.10
TB, mostly tables of indices, and launches some 4,000 kernels (0.58 TB and 22,000 if torch gathers
the keys). This was not timed on a GPU.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.attention.block_sparse_attention import QueryBlocks
from kernels.attention.hip_scores import (
    QueryBlockTile,
    by_centre,
    by_every_key,
    by_halving,
    cut_into_tiles,
    halvings,
    held_per_key,
    share_on_list,
)


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
    rounds = halvings(math.ceil(search.longest / search.key_block), search.kept)
    judged = search.longest if search.exact else 2 * search.kept * search.key_block
    parts = cut_into_tiles(queries, keys, blocks, judged * held_per_key(queries))
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
    parts = cut_into_tiles(queries, keys, blocks, judged * held_per_key(queries))
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
    # As `high` in `_prune`: later keys are in the window of every row that uses the list.
    last = torch.minimum(positions, positions + region.served - 1 - region.window)
    scored = torch.zeros_like(positions)
    survivors = torch.zeros_like(positions)
    for number, (chunk, keep) in enumerate(stages):
        length = chunk * key_block
        there = (torch.div(last, length, rounding_mode="floor") - low // length + 1).clamp(min=0)
        there = torch.where(last >= low, there, 0)
        ratio = stages[number - 1].chunk // chunk
        chunks = there if number == 0 else torch.minimum(there, survivors * ratio)
        # Two keys per halving; a chunk of one key is scored by that key.
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
    parts = list(cut_into_tiles(queries, keys, blocks, keys.shape[1] * keys.shape[3]))
    lists = kept.flatten(0, 2).split([len(tile.queries) for tile in parts])
    shares = [
        share_on_list(tile, own, keys.shape[1], key_block)
        for tile, own in zip(parts, lists, strict=True)
    ]
    rows = torch.cat(shares).view(B, H, -1)
    return torch.gather(rows, 2, blocks.places[:, None].expand(B, H, L))


def _descend(tile: QueryBlockTile, search: Search, rounds: int) -> Int[Tensor, "M K"]:
    """Tree search: split every range, keep the best halves, until each holds one block."""
    n_blocks = tile.positions[:, -1:] // search.key_block + 1
    number = torch.arange(search.kept, device=n_blocks.device)
    few = n_blocks <= search.kept
    # With fewer blocks than ranges each range is one block, and ranges past the last are empty.
    begin = torch.where(few, number.minimum(n_blocks), number * n_blocks // search.kept)
    after = number + 1
    end = torch.where(few, after.minimum(n_blocks), after * n_blocks // search.kept)
    judge = (
        by_every_key(tile, search.longest) if search.exact else by_centre(tile, search.key_block)
    )
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
    tile: QueryBlockTile, search: Search, stages: tuple[Stage, ...], region: Region
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
    exact = by_every_key(tile, search.longest) if search.exact else None
    for chunk, keep in stages:
        length = chunk * search.key_block
        pieces = torch.arange(before // chunk, device=last.device)
        # Numbers of the surviving chunks' pieces, in units of this stage's length.
        chunks = (chunks[:, :, None] * (before // chunk) + pieces).flatten(1)
        begins = (chunks * length).clamp(min=region.n_sink)
        ends = ((chunks + 1) * length).minimum(high).maximum(begins)
        judge = exact or by_halving(tile, length)
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


def _candidates(search: Search, stages: tuple[Stage, ...]) -> list[int]:
    """The most chunks that each stage scores."""
    counts = [math.ceil(search.longest / (stages[0].chunk * search.key_block))]
    for before, stage in itertools.pairwise(stages):
        counts.append(min(counts[-1], before.keep) * (before.chunk // stage.chunk))
    return counts
