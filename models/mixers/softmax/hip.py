"""HiP attention: a search selects the keys that each query reads (Lee et al. 2024 and 2025).

Changed: each query may select keys by itself, which makes the search causal and is the default;
when a list is refreshed depends on the position in the document, so that chunking changes nothing;
all stages of the staged search are refreshed together; keys keep their ordinary rotary positions.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.attention.block_sparse_attention import (
    BlockSparsity,
    QueryBlocks,
    block_sparse_attention,
    query_blocks,
)
from kernels.attention.hip_selection import (
    Region,
    Search,
    Stage,
    recall_at_k,
    staged_keys_scored,
    staged_search,
    tree_keys_scored,
    tree_search,
)
from models.mixer import MixFlops, Pattern, register
from models.mixers.softmax.attention import Attention, AttentionConfig, Coefficients
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class HipConfig(AttentionConfig):
    """Sizes of the search and of what is always read; parameters are those of `attention`.

    Attributes:
        k: keys that a search keeps; a multiple of `key_block`.
        key_block: keys of a block, which are selected together.
        query_block: queries of a block, which select together with selection block.
        n_sink: first keys of a document, always read.
        window: last keys, the query's own included, always read.
        selection: row for a selection per query; block for one per block of queries, as published,
            which makes the selection of earlier queries depend on later ones.
        method: tree halves k ranges at once; staged prunes shorter and shorter chunks.
        stage_chunks: key blocks per chunk in each stage; the last is 1.
        stage_keeps: keys that each stage keeps, in multiples of k; the last is 1.
        refresh: positions between searches; a search is made where it divides the position.
        representative: centre scores a block by its range's centre; oracle scores every key, for
            tests and ablations.
    """

    kind: ClassVar[str] = "hip"
    k: int = 512
    key_block: int = 2
    query_block: int = 32
    n_sink: int = 4
    window: int = 128
    selection: Literal["row", "block"] = "row"
    method: Literal["tree", "staged"] = "tree"
    stage_chunks: tuple[int, ...] = (32, 4, 1)
    stage_keeps: tuple[int, ...] = (16, 4, 1)
    refresh: int = 1
    representative: Literal["centre", "oracle"] = "centre"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "key_block", "query_block", "window", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        if self.n_sink < 0:
            raise ValueError(f"n_sink {self.n_sink} is negative; take 0 or more")
        if self.k % self.key_block:
            raise ValueError(
                f"k {self.k} is not a multiple of key_block {self.key_block}; take a multiple"
            )
        if self.refresh > 1 and self.window < self.refresh + self.key_block:
            raise ValueError(
                f"window {self.window} is shorter than the {self.refresh} tokens between searches "
                f"plus a key block, so some keys would be in neither; take "
                f"{self.refresh + self.key_block} or more, refresh + key_block"
            )
        self._check_stages()

    @property
    def approximate_reason(self) -> str:
        """Why it is for evaluation only; empty where it may be trained."""
        if self.selection == "block":
            return "queries of a block select keys together, so earlier outputs see later tokens"
        return "a selection of keys is reused by later queries" if self.refresh > 1 else ""

    def search(self, longest: int) -> Search:
        """The search of documents of at most `longest` keys."""
        kept = self.k // self.key_block
        if self.refresh == 1:
            # A reused list must keep its size from chunk to chunk; a fresh one needs no more than
            # all blocks.
            kept = min(kept, -(-longest // self.key_block))
        return Search(kept, self.key_block, longest, self.representative == "oracle")

    def stages(self) -> tuple[Stage, ...]:
        """The stages in key blocks and chunks."""
        kept = self.k // self.key_block
        pairs = zip(self.stage_chunks, self.stage_keeps, strict=True)
        return tuple(Stage(chunk, -(-kept * keep // chunk)) for chunk, keep in pairs)

    def region(self) -> Region:
        """What stages search."""
        return Region(self.n_sink, self.window, self.refresh)

    def keys_scored(self, positions: Int[Tensor, " L"]) -> Int[Tensor, " L"]:
        """Count the keys that one head's search scores for a row at each place of its document."""
        if self.method == "staged":
            return staged_keys_scored(positions, self.key_block, self.stages(), self.region())
        return tree_keys_scored(positions, self.k // self.key_block, self.key_block)

    def _check_stages(self) -> None:
        chunks, keeps = self.stage_chunks, self.stage_keeps
        whole = all(a % b == 0 for a, b in itertools.pairwise(chunks))
        falling = all(a >= b for a, b in itertools.pairwise(keeps))
        if len(chunks) != len(keeps) or chunks[-1:] != (1,) or keeps[-1:] != (1,):
            raise ValueError(
                f"stage_chunks {chunks} and stage_keeps {keeps} do not describe the same stages "
                "down to single blocks and k keys; give lists of equal length that end with 1"
            )
        if not whole or not falling:
            raise ValueError(
                f"stage_chunks {chunks} or stage_keeps {keeps} do not narrow down; make each chunk "
                "a multiple of the next, and stage_keeps nonincreasing"
            )


@register(HipConfig)
class Hip(Attention):
    """M = softmax(queries keys^T / sqrt(P)) over selected keys, sinks and the window.

    The selection has no gradient. Parameters are named as in `attention`, so that the weights of a
    trained model load.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    stops_nan = True
    traced = False
    config: HipConfig

    def mix(
        self, values: Float[Tensor, "B S G P"], coefficients: Coefficients, sequence: WholeSequence
    ) -> Float[Tensor, "B L H P"]:
        """Search, then attend to the selected keys, with the softmax in float32.

        Raises:
            ValueError: gradients are required, but the configuration is for evaluation only.
        """
        config = self.config
        if config.approximate_reason and torch.is_grad_enabled() and values.requires_grad:
            raise ValueError(
                f"hip with selection {config.selection} and refresh {config.refresh} is evaluation "
                f"only ({config.approximate_reason}); train with selection row and refresh 1"
            )
        queries, keys, _ = coefficients
        blocks = self._blocks(sequence, keys.shape[1])
        reach = BlockSparsity(config.key_block, config.n_sink, config.window)

        def attend(before: Tensor | None) -> tuple[Tensor, Tensor]:
            kept = self._listed(queries, keys, blocks, sequence, before)
            mixed = block_sparse_attention(queries, keys, values, kept, blocks, reach)
            return mixed, blocks.last(kept)

        # With refresh above 1 the last list is part of the decoding state.
        return attend(None)[0] if config.refresh == 1 else sequence.recur(attend)

    def unsharded(self) -> str:
        """Why it does not support sequence parallelism; reused lists would cross ranks."""
        if self.config.refresh > 1 or self.config.selection == "block":
            return (
                f"selection {self.config.selection} with refresh {self.config.refresh} reuses "
                "lists of earlier tokens; take selection row and refresh 1"
            )
        return super().unsharded()

    def recall(self, x: Float[Tensor, "B L D"], sequence: WholeSequence) -> Float[Tensor, "B H L"]:
        """Share of each query's k highest-scoring keys that its search finds.

        Ignores sinks and window. Scores every key.
        """
        queries, keys, _ = self.project(sequence.without_padding(x), sequence)[1]
        blocks = self._blocks(sequence, keys.shape[1])
        kept = self._search(queries, keys, blocks, sequence)
        return recall_at_k(queries, keys, kept, blocks, self.config.key_block)

    def mix_flops(self, queries: int, keys: int) -> MixFlops:
        """Attention to the keys read, and a product for each key scored by the search (D.3)."""
        config = self.config
        each = 2.0 * config.n_heads * self.head_dim
        places = torch.arange(keys - queries, keys, device="cpu")
        read = (places + 1).clamp(max=config.k + config.n_sink + config.window)
        if config.selection == "block":
            ends = (places // config.query_block + 1) * config.query_block
            scored = config.keys_scored(ends.clamp(max=keys) - 1)
        else:
            scored = config.keys_scored(places) * (places % config.refresh == 0)
        needed = each * (2 * int(read.sum()) + int(scored.sum()))
        return MixFlops(needed=needed, full_square=super().mix_flops(queries, keys).full_square)

    def _blocks(self, sequence: WholeSequence, keys: int) -> QueryBlocks:
        config = self.config
        width = config.query_block if config.selection == "block" else config.refresh
        return query_blocks(sequence.positions(), keys, width, config.refresh)

    def _listed(
        self,
        queries: Tensor,
        keys: Tensor,
        blocks: QueryBlocks,
        sequence: WholeSequence,
        before: Tensor | None,
    ) -> Int[Tensor, "B H N K"]:
        """Search for each block of queries; the first may continue with the list of `before`."""
        if before is None:
            return self._search(queries, keys, blocks, sequence)
        first = blocks.positions[:, 0, 0]
        goes_on = first % self.config.refresh != 0
        if self.config.selection == "block":
            goes_on = goes_on & (first % self.config.query_block != 0)
        head, rest = blocks.split(1)
        kept = before[:, :, None]
        if not bool(goes_on.all()):
            found = self._search(queries, keys, head, sequence)
            kept = torch.where(goes_on[:, None, None, None], kept, found)
        if rest.rows.shape[1]:
            kept = torch.cat([kept, self._search(queries, keys, rest, sequence)], dim=2)
        return kept

    def _search(
        self, queries: Tensor, keys: Tensor, blocks: QueryBlocks, sequence: WholeSequence
    ) -> Int[Tensor, "B H N K"]:
        config = self.config
        if config.selection == "row":
            blocks = blocks.first_rows()
        longest = keys.shape[1]
        if sequence.packed:
            longest = int(sequence.positions().max()) + 1
        search = config.search(longest)
        if config.method == "tree":
            return tree_search(queries, keys, blocks, search)
        return staged_search(queries, keys, blocks, search, config.stages(), config.region())
