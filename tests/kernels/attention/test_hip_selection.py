"""HiP's searches against loops over ranges, exact top-k, and what is known of their recall."""

import numpy as np
import pytest
import torch

from kernels.attention import block_sparse_attention as tiling
from kernels.attention import hip_scores
from kernels.attention.block_sparse_attention import query_blocks
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
from tests.kernels.largest_tensor import LargestTensor
from tests.oracles import hip as oracle

STAGES = (Stage(4, 4), Stage(2, 5), Stage(1, 3))


def make_case(lengths, width, heads=(2, 2), seed=0):
    generator = torch.Generator().manual_seed(sum(lengths) + seed)
    L, (H, G) = sum(lengths), heads
    queries = torch.randn(2, L, H, 4, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, L, G, 4, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    return queries, keys, query_blocks(positions, L, width, 1)


def assert_lists_equal(found, case, choose):
    """Hold every list against that of a loop, which gets the scores and places of its rows."""
    queries, keys, blocks = case
    group = queries.shape[2] // keys.shape[2]
    for b, h, n in np.ndindex(found.shape[:3]):
        places = blocks.positions[b, n].unique().numpy()
        begin, rows = int(blocks.begins[b, n]), blocks.rows[b, n].unique()
        scores = queries[b, rows, h] @ keys[b, begin : begin + places[-1] + 1, h // group].T
        wanted = choose(scores.numpy(), places)
        assert sorted(c for c in found[b, h, n].tolist() if c >= 0) == wanted


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize(("kept", "key_block"), [(1, 1), (3, 1), (4, 2), (5, 3)])
@pytest.mark.parametrize("lengths", [(1,), (67,), (9, 1, 20, 40)])
def test_the_tree_keeps_the_blocks_that_a_loop_over_ranges_keeps(
    lengths, kept, key_block, width, exact
):
    case = make_case(lengths, width, heads=(2, 1))
    found = tree_search(*case, Search(kept, key_block, max(lengths), exact))
    assert_lists_equal(found, case, lambda s, rows: oracle.tree(s, rows, kept, key_block, exact))


@pytest.mark.parametrize("key_block", [1, 2])
@pytest.mark.parametrize("kept", [1, 2, 16, 100])
@pytest.mark.parametrize("length", [1, 2, 31, 64, 257, 1023])
def test_judging_by_every_key_finds_the_exact_top_k(length, kept, key_block):
    queries, keys, _ = make_case((length,), 1, heads=(1, 1))
    last = torch.arange(max(0, length - 3), length)
    case = queries[:, last], keys, query_blocks(last.expand(2, -1), length, 1, 1)
    found = tree_search(*case, Search(kept, key_block, length, exact=True))
    assert_lists_equal(found, case, lambda s, rows: oracle.exact_top(s, rows, kept, key_block))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("key_block", [1, 3])
@pytest.mark.parametrize("lengths", [(1,), (9, 1, 20, 90)])
def test_stages_keep_the_blocks_that_a_loop_over_chunks_keeps(lengths, key_block, width, exact):
    case, window, sinks = make_case(lengths, width, heads=(2, 1)), 7, 2
    search = Search(3, key_block, max(lengths), exact)
    found = staged_search(*case, search, STAGES, Region(sinks, window, 1))

    def choose(scores, rows):
        region = sinks, rows[-1] - window + 1
        return oracle.staged(scores, rows, list(STAGES), region, key_block, exact)

    assert_lists_equal(found, case, choose)


def test_one_stage_that_judges_by_every_key_is_the_exact_top_k():
    case = make_case((61,), 1)
    found = staged_search(*case, Search(4, 2, 61, exact=True), (Stage(1, 4),), Region(0, 0, 1))
    assert_lists_equal(found, case, lambda s, rows: oracle.exact_top(s, rows, 4, 2))


def test_stages_that_keep_all_list_every_block_outside_sinks_and_window():
    case, stages = make_case((61,), 1), (Stage(4, 64), Stage(1, 64))
    found = staged_search(*case, Search(31, 2, 61, exact=False), stages, Region(4, 9, 1))
    assert_lists_equal(found, case, lambda _, rows: list(range(2, (rows[-1] - 7) // 2)))


@pytest.mark.parametrize("width", [1, 8])
def test_lists_hold_as_many_blocks_as_they_may_each_once_and_within_the_document(width):
    case = make_case((9, 1, 20, 40), width)
    blocks = case[2]
    for found in (
        tree_search(*case, Search(4, 2, 40, exact=False)),
        staged_search(*case, Search(4, 2, 40, False), (Stage(1, 4),), Region(0, 0, 1)),
    ):
        there = blocks.positions[:, None, :, -1] // 2 + 1
        listed = found >= 0
        assert torch.equal(listed.sum(3), there.clamp(max=4).expand_as(found[..., 0]))
        assert (found < there[..., None]).all()
        ordered = found.sort(dim=3).values
        assert ((ordered[..., 1:] > ordered[..., :-1]) | (ordered[..., 1:] < 0)).all()


@pytest.mark.parametrize("largest", [0, 1])
def test_equal_scores_go_to_the_earlier_range(largest):
    case = make_case((70,), 1)
    for x in case[:2]:
        x.round_().clamp_(-largest, largest)
    found = tree_search(*case, Search(3, 2, 70, exact=False))
    assert_lists_equal(found, case, lambda s, rows: oracle.tree(s, rows, 3, 2))
    found = staged_search(*case, Search(3, 2, 70, False), STAGES, Region(0, 0, 1))

    def choose(scores, rows):
        return oracle.staged(scores, rows, list(STAGES), (0, rows[-1] + 1), 2)

    assert_lists_equal(found, case, choose)


@pytest.mark.parametrize("method", ["tree", "staged"])
def test_rows_that_choose_alone_do_not_know_later_tokens(method):
    queries, keys, blocks = make_case((60,), 1)
    before = searched(method, queries, keys, blocks)
    for changed in (queries, keys):
        changed[:, 30:] += 100.0
        assert torch.equal(searched(method, queries, keys, blocks)[:, :, :30], before[:, :, :30])


@pytest.mark.parametrize("method", ["tree", "staged"])
def test_rows_that_choose_together_do_know_later_ones_of_their_block(method):
    queries, keys, blocks = make_case((60,), 8)
    before = searched(method, queries, keys, blocks)
    queries[:, 55] *= -100.0
    changed = (searched(method, queries, keys, blocks) != before).any(3).any(1).any(0)
    assert changed.tolist() == [False] * 6 + [True, False]


def searched(method, queries, keys, blocks):
    search = Search(3, 2, queries.shape[1], exact=False)
    if method == "tree":
        return tree_search(queries, keys, blocks, search)
    return staged_search(queries, keys, blocks, search, STAGES, Region(2, 7, 1))


def test_each_query_head_chooses_for_itself_from_its_groups_keys():
    queries, keys, blocks = make_case((40,), 1, heads=(4, 2))
    repeated = keys.repeat_interleave(2, dim=2)
    search = Search(3, 2, 40, exact=False)
    grouped = tree_search(queries, keys, blocks, search)
    assert torch.equal(grouped, tree_search(queries, repeated, blocks, search))
    assert not torch.equal(grouped[:, 0], grouped[:, 1])


def smooth_scores(tokens, spread, series=10):
    """Keys of width 1 whose scores with a query of 1 are noise, smoothed by a Gaussian."""
    noise = torch.randn(series, 1, tokens + 80, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(-40, 41) / max(spread, 1e-3)
    weights = torch.exp(-0.5 * distance**2)
    scores = torch.nn.functional.conv1d(noise, weights[None, None])
    return torch.ones(series, 1, 1, 1), scores[:, 0, :tokens, None, None]


@pytest.mark.parametrize(
    ("spread", "low", "high"), [(0, 0.09, 0.15), (4, 0.9, 0.98), (16, 0.99, 1)]
)
def test_recall_of_the_best_256_of_8192_keys_grows_with_smoothness(spread, low, high):
    queries, keys = smooth_scores(8192, spread)
    blocks = query_blocks(torch.full((len(keys), 1), 8191), 8192, 1, 1)
    found = tree_search(queries, keys, blocks, Search(256, 1, 8192, exact=False))
    assert low <= recall_at_k(queries, keys, found, blocks, 1).mean() <= high


def test_recall_is_the_share_of_the_best_keys_counted_by_a_loop():
    queries, keys, blocks = make_case((9, 30), 8)
    found = tree_search(queries, keys, blocks, Search(3, 2, 30, exact=False))
    recall = recall_at_k(queries, keys, found, blocks, 2)
    for b, i, h in np.ndindex(2, 39, 2):
        block, row = divmod(int(blocks.places[b, i]), 8)
        begin, place = int(blocks.begins[b, block]), int(blocks.positions[b, block, row])
        scores = keys[b, begin : begin + place + 1, h] @ queries[b, i, h]
        best = scores.argsort(descending=True)[:6].tolist()
        share = np.mean([t // 2 in found[b, h, block].tolist() for t in best])
        assert recall[b, h, i].item() == pytest.approx(share)


def test_exact_search_of_single_keys_has_recall_one():
    case = make_case((50,), 1)
    found = tree_search(*case, Search(7, 1, 50, exact=True))
    assert torch.all(recall_at_k(*case[:2], found, case[2], 1) == 1)


@pytest.fixture
def judged(monkeypatch):
    """How many ranges each round or stage of the loop judges, in turn."""
    counts, strongest = [], oracle.strongest

    def counting(ranges, scores, kept):
        counts.append(len(ranges))
        return strongest(ranges, scores, kept)

    monkeypatch.setattr(oracle, "strongest", counting)
    return counts


@pytest.mark.parametrize(("kept", "key_block"), [(1, 1), (3, 2), (8, 1)])
def test_keys_scored_by_the_tree_are_two_blocks_for_each_range_and_round_of_the_loop(
    judged, kept, key_block
):
    for place in range(130):
        judged.clear()
        oracle.tree(np.zeros((1, 130)), np.array([place]), kept, key_block)
        counted = tree_keys_scored(torch.tensor([place]), kept, key_block).item()
        rounds = counted / (2 * kept * key_block)
        # A round is spared where no longest range survives; not if all are equally long.
        equal = (place // key_block + 1) / kept
        spared = 0 if equal in (1, 2, 4, 8, 16, 32, 64) else 1
        assert rounds - spared <= len(judged) <= rounds
        assert all(kept < n <= 2 * kept for n in judged)


def test_keys_scored_of_8192_keys_are_those_that_the_reference_card_measured():
    assert tree_keys_scored(torch.tensor([8191]), 256, 1) == 2560


def test_keys_scored_by_stages_are_two_for_each_halving_of_a_chunk_of_the_loop(judged):
    stages, window = (Stage(8, 2), Stage(2, 3), Stage(1, 2)), 5
    for place in range(130):
        judged.clear()
        region = 0, place - window + 1
        oracle.staged(np.zeros((1, 130)), np.array([place]), list(stages), region, 2)
        halvings = [4, 2, 1]
        wanted = sum(2 * n * each for n, each in zip(judged, halvings, strict=True))
        counted = staged_keys_scored(torch.tensor([place]), 2, stages, Region(0, window, 1))
        assert counted == wanted


@pytest.mark.parametrize("method", ["tree", "staged"])
def test_no_tensor_of_a_search_grows_with_queries_times_keys(monkeypatch, method):
    monkeypatch.setattr(tiling, "GATHERED", 1 << 11)
    largest = []
    for length in (64, 128):
        with LargestTensor() as tensors:
            searched(method, *make_case((length,), 1, heads=(1, 1)))
        largest.append(tensors.numbers)
    assert largest[1] <= 2 * largest[0] <= 64 * 64


def test_the_trees_work_for_fixed_k_is_not_quadratic(monkeypatch):
    gathered, take = [], hip_scores.take

    def counting(rows, index):
        gathered.append(index.numel())
        return take(rows, index)

    monkeypatch.setattr(hip_scores, "take", counting)
    counts = []
    for length in (512, 1024, 2048):
        gathered.clear()
        searched("tree", *make_case((length,), 1, heads=(1, 1)))
        counts.append(sum(gathered) / length)
    assert counts[2] - counts[1] == counts[1] - counts[0] == 2 * (2 * 3 * 2)
