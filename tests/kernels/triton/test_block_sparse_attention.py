"""Block-sparse attention's Triton kernels against float64 masks, outputs and gradients."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from kernels.attention.block_sparse_attention import (
    BlockSparsity,
    QueryBlocks,
    block_sparse_attention,
    query_blocks,
)
from tests.kernels.agreement import assert_agrees
from tests.kernels.triton.cases import DEVICE
from tests.oracles import hip, local_attention

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = (9, 1, 18, 9)
REACH = BlockSparsity(2, 4, 5)


@dataclass(frozen=True)
class Lists:
    """Queries, keys, values and a gradient of the outputs; which query has which list.

    Attributes:
        places: place of each token in its document.
        begins: first token of each token's document.
        width: queries of a block.
        kept: list of each block, (B, H, N, K).
    """

    inputs: tuple[torch.Tensor, ...]
    places: np.ndarray
    begins: np.ndarray
    width: int
    kept: torch.Tensor
    reach: BlockSparsity

    @property
    def own(self):
        """Number of the list of each query."""
        starts = self.places[-self.inputs[0].shape[1] :] % self.width == 0
        starts[0] = True
        return np.cumsum(starts) - 1


def draw(lengths, width=1, reach=REACH, listed=3, queries=None, dtype=torch.float32, **shape):
    """A case of documents of these lengths; a list may hold none, repeat itself or name sinks."""
    heads, groups, P, Q, batch = ({"h": 2, "g": 1, "p": 5, "q": 3, "b": 1} | shape).values()
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    S = sum(lengths)
    L = queries or S
    shapes = ((L, heads, P), (S, groups, P), (S, groups, Q), (L, heads, Q))
    inputs = tuple(torch.randn(batch, *x, generator=generator).to(dtype) for x in shapes)
    places = np.concatenate([np.arange(n) for n in lengths])
    empty = torch.empty(batch, heads, L, 0, dtype=torch.int64)
    case = Lists(inputs, places, np.arange(S) - places, width, empty, reach)
    last = np.zeros(case.own[-1] + 1, dtype=np.int64)
    np.maximum.at(last, case.own, places[-L:])
    blocks = torch.from_numpy(last)[:, None] // reach.key_block + 1
    drawn = torch.rand(batch, heads, len(last), listed, generator=generator)
    return replace(case, kept=(drawn * (blocks + 1)).long() - 1)


def run(case):
    """Outputs, and gradients of queries, keys and values."""
    *tensors, d_mixed = (x.to(DEVICE) for x in case.inputs)
    B, L = tensors[0].shape[:2]
    positions = torch.from_numpy(case.places[-L:]).expand(B, L)
    blocks = query_blocks(positions, tensors[1].shape[1], case.width, case.width)
    blocks = QueryBlocks(*(x.to(DEVICE) for x in blocks))
    leaves = [x.clone().requires_grad_() for x in tensors]
    mixed = block_sparse_attention(*leaves, case.kept.to(DEVICE), blocks, case.reach)
    gradients = torch.autograd.grad(mixed, leaves, d_mixed)
    return [x.detach().cpu() for x in (mixed, *gradients)]


def expected(case):
    """What `run` returns, from sets of keys, one head after another."""
    q, k, v, d_mixed = (x.double().numpy() for x in case.inputs)
    (B, L, H, _), (S, G) = q.shape, k.shape[1:3]
    results = [
        np.zeros((B, L, H, v.shape[3])),
        np.zeros_like(q),
        np.zeros_like(k),
        np.zeros_like(v),
    ]
    for b, h in np.ndindex(B, H):
        mask = np.zeros((1, L, S), dtype=bool)
        for i, token in enumerate(range(S - L, S)):
            seen = hip.seen_keys(
                int(case.places[token]), case.kept[b, h, case.own[i]].tolist(), *case.reach
            )
            mask[0, i, case.begins[token] + np.array(seen)] = True
        g = h // (H // G)
        head = [x[b : b + 1, :, y : y + 1] for x, y in ((q, h), (k, g), (v, g), (d_mixed, h))]
        results[0][b, :, h] += local_attention.attend(*head[:3], mask)[0, :, 0]
        found = local_attention.gradients(*head[:3], mask, head[3])
        for result, y, part in zip(results[1:], (h, g, g), found, strict=True):
            result[b, :, y] += part[0, :, 0]
    return results


def assert_matches_sets(case, dtype=torch.float32):
    (mixed, *gradients), (wanted, *others) = run(case), expected(case)
    assert_agrees(mixed, wanted, "outputs", dtype)
    # A query that sees one key alone has a gradient of zero, up to rounding.
    scale = np.sqrt(np.mean(others[2] ** 2))
    for found, other in zip(gradients, others, strict=True):
        if np.abs(other).max() < 1e-12 * scale:
            assert found.abs().max() < 1e-6 * scale
        else:
            assert_agrees(found, other, "gradients", dtype)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_rows_of_any_length_match_their_sets_in_outputs_and_every_gradient(length):
    assert_matches_sets(draw((length,), reach=BlockSparsity(2, 4, 9), listed=4, h=1))


@pytest.mark.parametrize("lengths", [(1000,), (350, 1, 649)])
def test_blocks_of_long_documents_match_their_sets_and_gradients(lengths):
    assert_matches_sets(draw(lengths, 20, BlockSparsity(4, 4, 64), 12, h=1))


@pytest.mark.parametrize("width", [1, 8, 32])
def test_ragged_documents_match_their_sets_and_gradients(width):
    assert_matches_sets(draw(RAGGED, width, b=2))


def test_queries_of_the_last_tokens_match_their_sets_and_gradients():
    assert_matches_sets(draw((40, 30), 8, queries=37))
    assert_matches_sets(draw((40, 20), queries=9))


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (3, 3, 17), (2, 1, 70)])
def test_any_heads_and_widths_match_their_sets_and_gradients(heads, groups, width):
    assert_matches_sets(draw((9, 14), 8, h=heads, g=groups, p=width, q=width + 3))


def test_a_block_of_more_rows_than_a_tile_matches_its_sets():
    assert_matches_sets(draw((150,), 70, BlockSparsity(3, 2, 9), 5))


@pytest.mark.parametrize(
    "reach", [BlockSparsity(1, 0, 1), BlockSparsity(16, 20, 3), BlockSparsity(2, 100, 200)]
)
def test_any_reach_matches_its_sets_and_gradients(reach):
    assert_matches_sets(draw((20, 13), 4, reach))


@pytest.mark.parametrize("listed", [0, 2])
def test_without_a_list_many_queries_equal_sinks_and_window(listed):
    case = draw((30,), 4, listed=listed)
    assert_matches_sets(replace(case, kept=torch.full_like(case.kept, -1)))


def test_a_key_that_is_listed_twice_a_sink_and_near_is_counted_once():
    case = draw((24,), 4, listed=2)
    last = torch.arange(6)[None, None, :, None].expand(1, 2, 6, 1) * 2
    kept = torch.cat([case.kept, last, last + 1, torch.zeros_like(last), case.kept], dim=3)
    again = replace(case, kept=kept)
    assert_matches_sets(again)
    other = replace(case, kept=kept.flip(3))
    assert all(torch.equal(*pair) for pair in zip(run(again), run(other), strict=True))


@pytest.mark.parametrize("width", [1, 8])
def test_bfloat16_gives_bfloat16_within_its_rounding_even_in_gradients(width):
    # The interpreter cuts float32 off to bfloat16, which is twice as far off as rounding.
    case = draw((20, 40) if width > 1 else (9, 14), width, dtype=torch.bfloat16)
    assert all(x.dtype is torch.bfloat16 for x in run(case))
    assert_matches_sets(case, torch.bfloat16)


def test_large_scores_neither_overflow_nor_lose_the_softmax():
    case = draw((30,), 4)
    loud = tuple(x * s for x, s in zip(case.inputs, (30, 30, 1, 1), strict=True))
    case = replace(case, inputs=loud)
    assert np.abs(run(case)[0].double().numpy() - expected(case)[0]).max() < 1e-3


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize(
    ("width", "value"), [(1, torch.nan), (8, torch.nan), (8, torch.inf), (8, 1e4)]
)
def test_nan_infinity_and_huge_values_stay_in_their_document(width, value):
    lengths, spoilt = (7, 11, 5), slice(7, 18)
    case = draw(lengths, width)
    dirty = [x.clone() for x in case.inputs]
    for x in dirty:
        x[:, spoilt] = value
    others = np.r_[0:7, 18:23]
    clean, found = run(case), run(replace(case, inputs=tuple(dirty)))
    for x, y in zip(clean, found, strict=True):
        assert torch.equal(x[:, others], y[:, others])


def test_a_nan_in_a_gradient_reaches_the_keys_that_its_query_sees():
    case = draw((12, 9), 1, BlockSparsity(2, 1, 3), 1)
    dirty = [x.clone() for x in case.inputs]
    dirty[3][:, 15] = torch.nan
    _, d_q, d_k, d_v = run(replace(case, inputs=tuple(dirty)))
    seen = {
        12 + key
        for h in range(2)
        for key in hip.seen_keys(3, case.kept[0, h, 15].tolist(), *case.reach)
    }
    for x in (d_k, d_v):
        assert set(np.flatnonzero(x.isnan().any(dim=3)[0, :, 0])) == seen
    assert set(np.flatnonzero(d_q.isnan().any(dim=3)[0, :, 0])) == {15}


@pytest.mark.parametrize("width", [1, 8])
def test_two_runs_are_equal_bit_for_bit(width):
    case = draw((20, 45), width, h=2, listed=6) if width > 1 else draw((9, 14), listed=6)
    assert all(torch.equal(*pair) for pair in zip(run(case), run(case), strict=True))
