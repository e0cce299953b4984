"""Checkpoint attention against a mask over all tokens, in outputs and every gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels.attention.checkpoint_attention as kernel
from kernels.attention.checkpoint_attention import (
    Places,
    Segments,
    checkpoint_attention,
    checkpoint_attention_reference,
)
from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.kernels.largest_tensor import LargestTensor
from tests.oracles import local_attention as oracle


def make_inputs(length, dtype=torch.float64, batch=2, heads=4, groups=2):
    """Queries, keys, values of tokens and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, 8), (groups, 8), (groups, 6), (heads, 6))
    return [torch.randn(batch, length, *s, generator=generator, dtype=dtype) for s in shapes]


def one_document(length, batch=2):
    return torch.zeros(batch, length, dtype=torch.int32)


def ragged(length, batch=2, padding=0):
    """Rows whose documents differ, the first of them with padding at its end."""
    ids = torch.from_numpy(ragged_documents(batch, length, np.random.default_rng(length)))
    ids[0, length - padding :] = -1
    return ids


def ends_of(documents, every):
    """Index of the tokens that end segments, filled up with -1, and where all tokens stand."""
    at = torch.from_numpy(oracle.places(documents.numpy()))
    ends = [
        torch.nonzero(((row + 1) % every == 0) & (ids >= 0))[:, 0]
        for row, ids in zip(at, documents, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(ends, batch_first=True, padding_value=-1), at


def sight_of(documents, every):
    index, at = ends_of(documents, every)
    taken = index.clamp(min=0)
    of_checkpoints = torch.gather(documents, 1, taken).masked_fill(index < 0, -1)
    return index, Places(documents, at, of_checkpoints, torch.gather(at, 1, taken))


def over_tokens(attend, index, sight):
    """The function of the tokens' queries, keys and values alone, checkpoints taken from them."""
    rows, taken = torch.arange(len(index))[:, None], index.clamp(min=0)
    return lambda q, k, v: attend(q, k, v, k[rows, taken], v[rows, taken], sight)


def differentiate(attend, inputs):
    q, k, v, d_mixed = inputs
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mixed = attend(*leaves)
    return mixed, torch.autograd.grad(mixed, leaves, d_mixed.to(mixed.dtype))


def assert_matches_oracle(attend, inputs, documents, every, dtype=torch.float64):
    mask = oracle.checkpointed(documents.numpy(), every)
    mixed, gradients = differentiate(attend, inputs)
    q, k, v, d_mixed = (x.double().numpy() for x in inputs)
    assert_agrees(mixed, oracle.attend(q, k, v, mask), "outputs", dtype)
    expected = oracle.gradients(q, k, v, mask, d_mixed)
    # Where each query sees itself alone, the gradients of queries and keys are zero.
    for found, wanted in zip(gradients, expected, strict=True):
        if mask.sum() == mask[..., 0].size and wanted is not expected[2]:
            assert found.abs().max() == 0
        else:
            assert_agrees(found, wanted, "gradients", dtype)


def segments_of(length, every, batch=2):
    """Checkpoint attention of rows that are one document each."""
    index, _ = ends_of(one_document(length, batch), every)
    return over_tokens(checkpoint_attention, index, Segments(every, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("every", [2, 3, 7, 10, 64])
@pytest.mark.parametrize("length", [1, "one segment less 1", "one segment", "and 1", 33, 300])
def test_segments_equal_the_mask_in_outputs_and_every_gradient(length, every, dtype):
    names = {"one segment less 1": every - 1, "one segment": every, "and 1": every + 1}
    length = names.get(length, length)
    inputs = make_inputs(length, dtype)
    attend = segments_of(length, every)
    assert_matches_oracle(attend, inputs, one_document(length), every, dtype)


@pytest.mark.parametrize("every", [1, 2, 5, 64])
@pytest.mark.parametrize("length", [1, 40, 300])
def test_documents_that_differ_by_row_equal_the_mask(length, every):
    documents = ragged(length, batch=3, padding=length // 4)
    attend = over_tokens(checkpoint_attention, *sight_of(documents, every))
    assert_matches_oracle(attend, make_inputs(length, batch=3), documents, every)


@pytest.mark.parametrize("every", [3, 10])
def test_the_reference_equals_the_mask(every):
    documents = ragged(50, padding=9)
    attend = over_tokens(checkpoint_attention_reference, *sight_of(documents, every))
    assert_matches_oracle(attend, make_inputs(50), documents, every)


@pytest.mark.parametrize("tile", [1, 2**10, 2**14])
def test_the_cut_into_tiles_changes_nothing(monkeypatch, tile):
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "SHORTEST", 8)
    assert_matches_oracle(segments_of(200, 3), make_inputs(200), one_document(200), 3)
    documents = ragged(200, batch=3, padding=30)
    attend = over_tokens(checkpoint_attention, *sight_of(documents, 3))
    assert_matches_oracle(attend, make_inputs(200, batch=3), documents, 3)


def test_checkpoints_that_nobody_sees_may_stand_anywhere():
    documents = ragged(60)
    index, sight = sight_of(documents, 4)
    S = index.shape[1]
    middle = S // 2
    order = [*range(middle), S, S, *range(middle, S), S]
    index = F.pad(index, (0, 1), value=-1)[:, order]
    gone = F.pad(sight.checkpoint_documents, (0, 1), value=-1)[:, order]
    at = F.pad(sight.checkpoint_positions, (0, 1))[:, order]
    spread = Places(sight.documents, sight.positions, gone, at)
    attend = over_tokens(checkpoint_attention, index, spread)
    assert_matches_oracle(attend, make_inputs(60), documents, 4)


@pytest.mark.parametrize("pieces", [(37,), (1,) * 37, (10, 1, 1, 25), (9, 9, 19), (3, 34)])
@pytest.mark.parametrize("every", [1, 4, 10])
def test_pieces_of_queries_equal_the_whole(every, pieces):
    q, k, v, _ = make_inputs(37)
    expected, found, begin = segments_of(37, every)(q, k, v), [], 0
    for n in pieces:
        now, seen = slice(begin, begin + n), slice(every - 1, begin + n, every)
        sight = Segments(every, begin)
        found.append(
            checkpoint_attention(q[:, now], k[:, now], v[:, now], k[:, seen], v[:, seen], sight)
        )
        begin += n
    assert_agrees(torch.cat(found, dim=1), expected, "outputs", torch.float64)


def test_segments_of_one_token_are_causal_attention():
    inputs = make_inputs(300)

    def causal(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)

    expected, found = differentiate(causal, inputs), differentiate(segments_of(300, 1), inputs)
    assert_agrees(found[0], expected[0], "outputs", torch.float64)
    for actual, wanted in zip(found[1], expected[1], strict=True):
        assert_agrees(actual, wanted, "gradients", torch.float64)


@pytest.mark.parametrize("every", [40, 41, 1000])
def test_without_an_earlier_segment_a_token_keeps_its_own_value(every):
    q, k, v, _ = make_inputs(40)
    assert torch.equal(segments_of(40, every)(q, k, v), v.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("every", [1, 3, 10])
def test_each_query_shares_out_1_among_itself_once_and_every_segment_before(every):
    q, k, _, _ = make_inputs(95)
    index, _ = ends_of(one_document(95), every)
    S = index.shape[1]
    own = torch.zeros(2, 95, 2, S + 1, dtype=q.dtype)
    own[..., S] = 1
    others = torch.eye(S, S + 1, dtype=q.dtype)[None, :, None].expand(2, S, 2, S + 1)
    share = checkpoint_attention(q, k, own, k[:, index[0]], others, Segments(every, 0))
    assert torch.allclose(share.sum(dim=-1), torch.ones_like(share[..., 0]), atol=1e-14)
    expected = torch.arange(95) // every + 1
    assert torch.equal((share > 0).sum(dim=-1), expected[None, :, None].expand(2, 95, 4))


def test_gradients_are_those_of_finite_differences():
    documents = ragged(30, batch=1)
    leaves = [x[..., :3].clone().requires_grad_() for x in make_inputs(30, batch=1, heads=2)[:3]]
    attend = over_tokens(checkpoint_attention, *sight_of(documents, 2))
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_fewer_key_heads_equal_repeated_ones():
    q, k, v, _ = make_inputs(90)
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    attend = segments_of(90, 4)
    assert_agrees(attend(q, k, v), attend(q, *repeated), "outputs", torch.float64)


def test_a_document_does_not_feel_huge_values_in_another():
    documents = torch.tensor([[0] * 70 + [1] * 60]).int()
    q, k, v, d_mixed = make_inputs(130, torch.float32, batch=1)
    loud = [torch.where((documents == 0)[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
    attend = over_tokens(checkpoint_attention, *sight_of(documents, 5))
    quiet = differentiate(attend, (q, k, v, d_mixed))
    beside = differentiate(attend, (*loud, d_mixed))
    assert torch.equal(quiet[0][:, 70:], beside[0][:, 70:])
    for expected, found in zip(quiet[1], beside[1], strict=True):
        assert torch.equal(expected[:, 70:], found[:, 70:])


def test_autocast_lowers_nothing():
    inputs, attend = make_inputs(100, torch.float32), segments_of(100, 4)
    expected = differentiate(attend, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = differentiate(attend, inputs)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


def test_bfloat16_inputs_give_bfloat16_outputs():
    inputs, attend = make_inputs(100, torch.bfloat16), segments_of(100, 4)
    assert attend(*inputs[:3]).dtype is torch.bfloat16
    assert_matches_oracle(attend, inputs, one_document(100), 4, torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_is_as_large_as_all_pairs_of_queries_and_checkpoints(packed):
    length, every = 4096, 10
    attend = segments_of(length, every, batch=1)
    if packed:
        attend = over_tokens(checkpoint_attention, *sight_of(ragged(length, batch=1), every))
    inputs = make_inputs(length, torch.float32, batch=1, heads=2)
    with LargestTensor() as largest:
        differentiate(attend, inputs)
    assert largest.numbers <= kernel.TILE < length * length / every / 3


def test_backward_keeps_the_inputs_alone():
    q, k, v, _ = make_inputs(500, torch.float32)
    kept, seen = [], slice(3, None, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        checkpoint_attention(q.requires_grad_(), k, v, k[:, seen], v[:, seen], Segments(4, 0))
    assert sum(kept) == q.numel() + (k.numel() + v.numel()) * 5 / 4


def products(attend, length):
    """Pairs of a query and a checkpoint that are computed, for each row and head."""
    with FlopCounterMode(display=False) as counter:
        attend(*make_inputs(length, torch.float32)[:3])
    return counter.get_total_flops() / (2 * (8 + 6) * 2 * 4)


def test_checkpoints_after_all_queries_of_a_tile_are_skipped():
    S = 2048 // 10
    needed = 10 * S * (S - 1) / 2 + 8 * S
    assert needed <= products(segments_of(2048, 10), 2048) <= 1.15 * needed


def test_checkpoints_of_documents_that_no_query_of_a_tile_is_of_are_skipped():
    documents = torch.arange(8, dtype=torch.int32).repeat_interleave(256).expand(2, -1)
    attend = over_tokens(checkpoint_attention, *sight_of(documents, 4))
    assert products(attend, 2048) == 8 * 256 * 63


def test_meta_tensors_give_shapes_forward_and_backward():
    leaves = [x.to("meta").requires_grad_() for x in make_inputs(90)[:3]]
    q, k, v = leaves
    mixed = checkpoint_attention(q, k, v, k[:, 3::4], v[:, 3::4], Segments(4, 0))
    mixed.sum().backward()
    assert mixed.shape == (2, 90, 4, 6)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def test_wrong_numbers_of_checkpoints_are_refused():
    q, k, v, _ = make_inputs(20)
    with pytest.raises(ValueError, match="20 queries and 4 checkpoints, but sight is for 20 and 5"):
        checkpoint_attention(q, k, v, k[:, 3:16:4], v[:, 3:16:4], Segments(4, 0))
