"""HiP's searches by Triton kernel against loops over float64 scores of the same numbers."""

import pytest
import torch

from kernels.attention.block_sparse_attention import QueryBlocks, query_blocks
from kernels.attention.hip_selection import Region, Search, Stage, staged_search, tree_search
from kernels.triton_launch import recording
from tests.kernels.attention.test_hip_selection import assert_lists_equal
from tests.kernels.triton.cases import DEVICE
from tests.oracles import hip as oracle

pytestmark = pytest.mark.usefixtures("poisoned")

RAGGED = (9, 1, 20, 27)
STAGES = (Stage(4, 4), Stage(2, 5), Stage(1, 3))


def draw(lengths, width, heads=2, groups=1, P=4, batch=2, dtype=torch.float32):
    """Queries, keys and query blocks of packed documents of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    L = sum(lengths)
    queries, keys = (
        torch.randn(batch, L, n, P, generator=generator).to(dtype) for n in (heads, groups)
    )
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)
    return queries, keys, query_blocks(positions, L, width, 1)


def tree(case, search):
    queries, keys, blocks = case
    blocks = QueryBlocks(*(x.to(DEVICE) for x in blocks))
    return tree_search(queries.to(DEVICE), keys.to(DEVICE), blocks, search).cpu()


def staged(case, search, region, stages=STAGES):
    queries, keys, blocks = case
    blocks = QueryBlocks(*(x.to(DEVICE) for x in blocks))
    found = staged_search(queries.to(DEVICE), keys.to(DEVICE), blocks, search, stages, region)
    return found.cpu()


def exact(case):
    """The case in float64, of which the loops take their scores."""
    return case[0].double(), case[1].double(), case[2]


def assert_tree_equals_the_loop(case, kept, key_block, exact_scores=False):
    longest = int(case[2].positions.max()) + 1
    found = tree(case, Search(kept, key_block, longest, exact_scores))

    def choose(scores, rows):
        return oracle.tree(scores, rows, kept, key_block, exact_scores)

    assert_lists_equal(found, exact(case), choose)


def assert_stages_equal_the_loop(case, key_block, window=7, sinks=2):
    longest = int(case[2].positions.max()) + 1
    found = staged(case, Search(3, key_block, longest, False), Region(sinks, window, 1))

    def choose(scores, rows):
        region = sinks, rows[-1] - window + 1
        return oracle.staged(scores, rows, list(STAGES), region, key_block)

    assert_lists_equal(found, exact(case), choose)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_trees_of_any_length_match_the_loop(length, width):
    assert_tree_equals_the_loop(draw((length,), width, heads=1, batch=1), 5, 2)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize(("kept", "key_block"), [(1, 1), (4, 2), (5, 3)])
def test_trees_of_ragged_documents_match_the_loop(kept, key_block, width):
    assert_tree_equals_the_loop(draw(RAGGED, width, heads=1, batch=1), kept, key_block)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("key_block", [1, 3])
def test_stages_of_ragged_documents_match_the_loop(key_block, width):
    assert_stages_equal_the_loop(draw(RAGGED, width, heads=1, batch=1), key_block)


def test_a_long_document_matches_the_loop():
    assert_tree_equals_the_loop(draw((1000,), 32, heads=1, batch=1), 40, 2)


@pytest.mark.parametrize(("heads", "groups", "P"), [(4, 2, 16), (3, 3, 17), (2, 1, 70)])
def test_any_heads_and_widths_match_the_loop(heads, groups, P):
    assert_tree_equals_the_loop(draw((9, 40), 8, heads, groups, P, batch=1), 3, 2)


def test_blocks_of_more_rows_than_a_tile_match_the_loop():
    assert_tree_equals_the_loop(draw((150,), 70, batch=1), 5, 3)


def test_judging_by_every_key_of_ragged_documents_matches_the_exact_top():
    assert_tree_equals_the_loop(draw(RAGGED, 8, batch=1), 4, 2, exact_scores=True)


@pytest.mark.parametrize("width", [1, 8])
def test_bfloat16_is_judged_by_exact_products_as_the_loop_that_it_must_match(width):
    case = draw((45,), width, heads=1, batch=1, dtype=torch.bfloat16)
    assert_tree_equals_the_loop(case, 4, 2)


def test_equal_scores_match_the_loop_that_takes_the_earlier():
    queries, keys, blocks = draw((70,), 8, batch=1)
    assert_tree_equals_the_loop((queries.sign(), keys.sign(), blocks), 3, 2)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e4])
def test_nan_infinity_and_huge_values_stay_in_their_document(value):
    case = draw((17, 21, 15), 8, batch=1)
    dirty = [x.clone() for x in case[:2]]
    for x in dirty:
        x[:, 17:38] = value
    spoilt = case[2].begins[0] == 17
    for search in (
        lambda c: tree(c, Search(3, 2, 21, False)),
        lambda c: staged(c, Search(3, 2, 21, False), Region(1, 2, 1)),
    ):
        clean, found = search(case), search((*dirty, case[2]))
        assert torch.equal(clean[:, :, ~spoilt], found[:, :, ~spoilt])
        listed = found[:, :, spoilt]
        assert ((listed >= -1) & (listed <= 10)).all()


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_rows_that_choose_alone_match_whatever_later_tokens_are(size):
    queries, keys, blocks = draw((30,), 1, heads=1, batch=1)
    search = Search(3, 2, 30, exact=False)
    before = tree((queries, keys, blocks), search)
    for changed in (queries, keys):
        changed[:, 20:] += size
    after = tree((queries, keys, blocks), search)
    assert torch.equal(after[:, :, :20], before[:, :, :20])
    assert not torch.equal(after, before)


def test_two_runs_are_equal_bit_for_bit():
    case, search = draw(RAGGED, 8), Search(4, 2, 27, exact=False)
    assert torch.equal(tree(case, search), tree(case, search))


def test_a_round_starts_one_kernel_that_stores_no_key():
    shape = (1, 512, 2, 64)
    queries, keys = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(2))
    blocks = query_blocks(torch.empty(1, 512, dtype=torch.int64, device="meta"), 512, 32, 32)
    with recording() as launches:
        tree_search(queries, keys, blocks, Search(16, 2, 512, exact=False))
    assert [each.kernel.fn.__name__ for each in launches] == ["_score_kernel"] * 4
    lists, places = 16 * 2, 32
    numbers = 2 * lists * 32 * 64 + 2 * 512 * 2 * 64 + lists * (4 * 32 + 8 + 8 * places)
    assert all(each.bytes == numbers for each in launches)
