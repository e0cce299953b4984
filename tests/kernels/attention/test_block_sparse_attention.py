"""Attention over listed key blocks against loops over sets of keys, in outputs and gradients."""

import numpy as np
import pytest
import torch

from kernels.attention import block_sparse_attention as module
from kernels.attention.block_sparse_attention import (
    BlockSparsity,
    block_sparse_attention,
    block_sparse_attention_reference,
    query_blocks,
    visible_keys,
)
from tests.kernels.agreement import assert_agrees
from tests.kernels.largest_tensor import LargestTensor
from tests.oracles import hip as oracle

F64 = torch.float64
CASES = {
    "rows": ((37,), 1, BlockSparsity(2, 4, 5), 3),
    "packed rows": ((9, 1, 18, 9), 1, BlockSparsity(2, 4, 5), 3),
    "blocks": ((37,), 8, BlockSparsity(2, 4, 5), 3),
    "packed blocks": ((9, 1, 18, 9), 8, BlockSparsity(3, 2, 4), 2),
    "wide blocks": ((5, 16), 32, BlockSparsity(1, 0, 1), 4),
    "one token": ((1,), 8, BlockSparsity(4, 4, 8), 2),
}


@pytest.fixture(params=CASES)
def case(request):
    return make_case(*CASES[request.param])


def make_case(lengths, width, reach, n_listed, dtype=torch.float64, heads=(4, 2)):
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    L, (H, G) = sum(lengths), heads
    queries = torch.randn(2, L, H, 6, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, L, G, 6, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    blocks = query_blocks(positions, L, width, 1)
    N = blocks.rows.shape[1]
    top = blocks.positions[:, None, :, -1:] // reach.key_block + 1
    drawn = torch.rand(2, H, N, n_listed, generator=generator)
    kept = (drawn * (top + 1)).long() - 1
    tensors = [x.to(dtype) for x in (queries, keys, values)]
    return tensors, kept.to(torch.int32), blocks, reach


def by_loops(tensors, kept, blocks, reach):
    queries, keys, values = (x.double().numpy() for x in tensors)
    B, L, H, _ = queries.shape
    group = H // keys.shape[2]
    out = np.zeros((B, L, H, values.shape[3]))
    for b, i, h in np.ndindex(B, L, H):
        block, row = divmod(int(blocks.places[b, i]), blocks.rows.shape[2])
        begin, place = int(blocks.begins[b, block]), int(blocks.positions[b, block, row])
        lists = kept[b, h, block].tolist()
        seen = oracle.seen_keys(place, lists, *reach)
        k, v = (x[b, begin : begin + place + 1, h // group] for x in (keys, values))
        out[b, i, h] = oracle.attend(queries[b, i, h], k, v, seen)
    return out


def differentiate(attend, tensors, kept, blocks, reach, seed=3):
    leaves = [x.clone().requires_grad_() for x in tensors]
    outputs = attend(*leaves, kept, blocks, reach)
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
    return outputs, torch.autograd.grad((outputs * weight).sum(), leaves)


def test_outputs_equal_a_softmax_over_the_union_of_the_sets(case):
    assert_agrees(block_sparse_attention(*case[0], *case[1:]), by_loops(*case), "outputs", F64)


def test_the_dense_mask_marks_the_union_of_the_sets(case):
    outputs = block_sparse_attention_reference(*case[0], *case[1:])
    assert_agrees(outputs, by_loops(*case), "outputs", F64)


def test_gradients_equal_those_of_masked_attention(case):
    _, gradients = differentiate(block_sparse_attention, *case)
    _, expected = differentiate(block_sparse_attention_reference, *case)
    assert_agrees(torch.cat(gradients, 2), torch.cat(expected, 2), "gradients", F64)


def test_float32_agrees_with_float64_in_outputs_and_gradients():
    exact = make_case((9, 1, 18, 9), 1, BlockSparsity(2, 4, 5), 3)
    narrow = [x.float() for x in exact[0]]
    outputs, gradients = differentiate(block_sparse_attention, narrow, *exact[1:])
    expected, wanted = differentiate(block_sparse_attention, *exact)
    assert_agrees(outputs, expected, "outputs")
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_agrees(gradient, other, "gradients")


def test_bfloat16_loses_only_its_own_rounding_even_under_autocast():
    tensors, *rest = make_case((37,), 1, BlockSparsity(2, 4, 5), 3, torch.bfloat16)
    exact = block_sparse_attention(*(x.double() for x in tensors), *rest)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = block_sparse_attention(*tensors, *rest)
        outputs.float().sum()
    assert outputs.dtype is torch.bfloat16
    assert_agrees(outputs, exact, "outputs", torch.bfloat16)


def test_duplicated_and_shuffled_lists_change_nothing(case):
    tensors, kept, *rest = case
    longer = torch.cat([kept, kept.flip(3), kept], dim=3)
    assert torch.equal(
        block_sparse_attention(*tensors, kept, *rest),
        block_sparse_attention(*tensors, kept.flip(3), *rest),
    )
    outputs = block_sparse_attention(*tensors, longer, *rest)
    assert_agrees(outputs, block_sparse_attention(*tensors, kept, *rest), "outputs", F64)


def test_listing_sinks_and_the_window_again_changes_nothing():
    tensors, kept, blocks, reach = make_case((37,), 1, BlockSparsity(2, 4, 5), 3)
    place = blocks.positions[:, None, :, -1:].expand(-1, 4, -1, -1)
    seen = [torch.zeros_like(place), torch.ones_like(place), place // 2, (place - 4) // 2 + 1]
    seen[3] = torch.where(place >= 4, seen[3], 0)
    again = torch.cat([kept, *seen], dim=3)
    outputs = block_sparse_attention(*tensors, again, blocks, reach)
    expected = block_sparse_attention(*tensors, kept, blocks, reach)
    assert_agrees(outputs, expected, "outputs", F64)


def test_without_a_list_sinks_and_window_are_left():
    tensors, kept, blocks, reach = make_case((37,), 1, BlockSparsity(2, 2, 5), 3)
    outputs = block_sparse_attention(*tensors, torch.full_like(kept, -1), blocks, reach)
    queries, keys, values = (x.transpose(1, 2) for x in tensors)
    behind = torch.arange(37)[:, None] - torch.arange(37)
    mask = (behind >= 0) & ((behind < 5) | (torch.arange(37) < 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=True
    )
    assert torch.isfinite(outputs).all()
    assert_agrees(outputs, expected.transpose(1, 2), "outputs", F64)


def test_shares_sum_to_one(case):
    (queries, keys, values), *rest = case
    outputs = block_sparse_attention(queries, keys, torch.ones_like(values), *rest)
    assert (outputs - 1).abs().max() < 1e-12


def test_each_query_sees_no_key_after_itself_and_none_of_another_document(case):
    tensors, kept, blocks, reach = case
    seen = visible_keys(kept, tensors[1].shape[1], blocks, reach)
    document = torch.gather(blocks.begins, 1, blocks.places // blocks.rows.shape[2])
    index = torch.arange(seen.shape[3])
    assert not (seen & (index > index[:, None])).any()
    assert not (seen & (index < document[:, None, :, None])).any()
    assert seen.diagonal(dim1=2, dim2=3).all()


@pytest.mark.parametrize("width", [1, 8])
def test_nan_in_one_document_leaves_the_others_untouched(width):
    tensors, *rest = make_case((9, 18, 10), width, BlockSparsity(2, 4, 5), 3)
    clean, gradients = differentiate(block_sparse_attention, tensors, *rest)
    for begin, end in ((0, 9), (9, 27), (27, 37)):
        dirty = [x.clone() for x in tensors]
        for x in dirty:
            x[:, begin:end] = torch.nan
        others = torch.ones(37, dtype=torch.bool)
        others[begin:end] = False
        outputs, found = differentiate(block_sparse_attention, dirty, *rest)
        assert torch.equal(outputs[:, others], clean[:, others])
        for gradient, wanted in zip(found, gradients, strict=True):
            assert torch.equal(gradient[:, others], wanted[:, others])


def test_a_gpu_gathers_more_at_a_time():
    on_cpu, on_gpu = (
        list(module.tiles(4096, 1 << 16, torch.device(name))) for name in ("cpu", "cuda")
    )
    assert (len(on_cpu), len(on_gpu)) == (512, 4)
    assert on_gpu[-1].stop == 4096


def test_tiles_of_one_query_block_change_only_rounding(monkeypatch):
    case = make_case((9, 11), 8, BlockSparsity(2, 4, 5), 3)
    expected, wanted = differentiate(block_sparse_attention, *case)
    monkeypatch.setattr(module, "GATHERED", 1)
    outputs, gradients = differentiate(block_sparse_attention, *case)
    assert_agrees(outputs, expected, "outputs", F64)
    assert_agrees(torch.cat(gradients, 2), torch.cat(wanted, 2), "gradients", F64)


def test_gradients_do_not_depend_on_the_number_of_threads():
    case = make_case((300,), 1, BlockSparsity(2, 4, 60), 20, torch.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(block_sparse_attention, *case))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in runs[1:]:
        assert torch.equal(outputs, runs[0][0])
        assert all(torch.equal(x, y) for x, y in zip(gradients, runs[0][1], strict=True))


def test_no_tensor_grows_with_queries_times_keys(monkeypatch):
    monkeypatch.setattr(module, "GATHERED", 1 << 14)
    largest = []
    for length in (256, 512):
        case = make_case((length,), 1, BlockSparsity(2, 4, 16), 8, torch.float32, heads=(1, 1))
        with LargestTensor() as tensors:
            differentiate(block_sparse_attention, *case)
        largest.append(tensors.numbers)
    assert largest[1] <= 2 * largest[0] <= 256 * 256 / 2


@pytest.mark.parametrize("width", [2, 5, 32])
def test_query_blocks_hold_each_query_once_and_one_document(width):
    lengths, first = (9, 1, 18, 9), 3
    positions = torch.cat([torch.arange(first, 9), *(torch.arange(n) for n in lengths[1:])])
    positions = torch.stack([positions, torch.arange(7, 7 + len(positions))])
    blocks = query_blocks(positions, positions.shape[1] + 7, width, 2)
    for row in range(2):
        flat = blocks.rows[row].flatten()
        assert torch.equal(flat[blocks.places[row]], torch.arange(positions.shape[1]))
        for rows, here, begin in zip(
            blocks.rows[row], blocks.positions[row], blocks.begins[row], strict=True
        ):
            assert torch.equal(positions[row][rows], here)
            assert torch.equal(here - here[0], rows - rows[0])
            assert len({int(place) // width for place in here}) == 1
            assert begin + here[0] == rows[0] + 7


def test_a_block_that_began_earlier_is_finished_at_the_given_cuts():
    blocks = query_blocks(torch.arange(5, 21)[None], 21, 8, 2)
    begins = [int(places[0]) for places in blocks.positions[0]]
    assert begins == [5, 6, 8, 16]


def test_an_empty_window_and_missing_keys_are_refused():
    tensors, kept, blocks, reach = make_case((9,), 1, BlockSparsity(2, 4, 5), 3)
    with pytest.raises(ValueError, match="window of at least 1"):
        block_sparse_attention(*tensors, kept, blocks, reach._replace(window=0))
    short = [tensors[0], *(x[:, 1:] for x in tensors[1:])]
    with pytest.raises(ValueError, match="at least as many keys"):
        block_sparse_attention(*short, kept, blocks, reach)
