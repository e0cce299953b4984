"""Checkpoint attention's Triton kernels against a float64 mask over all tokens."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention.checkpoint_attention import Places, Segments, checkpoint_attention
from tests.kernels.attention.test_checkpoint_attention import (
    assert_matches_oracle,
    differentiate,
    ends_of,
    make_inputs,
    one_document,
    over_tokens,
    ragged,
    sight_of,
)
from tests.kernels.triton.cases import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")
F32 = torch.float32


def on_device(q, k, v, checkpoint_k, checkpoint_v, sight):
    """Checkpoint attention where the kernels run, from and to the CPU."""
    if isinstance(sight, Places):
        sight = Places(*(x.to(DEVICE) for x in sight))
    moved = (x.to(DEVICE) for x in (q, k, v, checkpoint_k, checkpoint_v))
    return checkpoint_attention(*moved, sight).cpu()


def segments_of(length, every):
    index, _ = ends_of(one_document(length), every)
    return over_tokens(on_device, index, Segments(every, 0))


@pytest.mark.parametrize("every", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_segments_equal_the_mask_in_outputs_and_every_gradient(length, every):
    inputs = make_inputs(length, F32)
    attend = segments_of(length, every)
    assert_matches_oracle(attend, inputs, one_document(length), every, F32)


def test_a_long_row_equals_the_mask():
    inputs = [x[..., :1, :] for x in make_inputs(1000, F32, batch=1, heads=1, groups=1)]
    index, _ = ends_of(one_document(1000, 1), 10)
    attend = over_tokens(on_device, index, Segments(10, 0))
    assert_matches_oracle(attend, inputs, one_document(1000, 1), 10, F32)


@pytest.mark.parametrize("every", [2, 5])
def test_documents_that_differ_by_row_equal_the_mask(every):
    documents = ragged(100, padding=25)
    attend = over_tokens(on_device, *sight_of(documents, every))
    assert_matches_oracle(attend, make_inputs(100, F32), documents, every, F32)


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
    attend = over_tokens(on_device, index, spread)
    assert_matches_oracle(attend, make_inputs(60, F32), documents, 4, F32)


def test_queries_of_a_later_piece_equal_those_of_the_whole():
    q, k, v, _ = make_inputs(70, F32)
    expected, now, seen = segments_of(70, 4)(q, k, v), slice(33, 70), slice(3, 70, 4)
    tensors = q[:, now], k[:, now], v[:, now], k[:, seen], v[:, seen]
    found = on_device(*tensors, Segments(4, 33))
    assert (found - expected[:, now]).abs().max() < 1e-5


def test_a_document_does_not_feel_huge_values_in_another():
    documents = torch.tensor([[0] * 70 + [1] * 40]).int()
    q, k, v, d_mixed = make_inputs(110, F32, batch=1)
    loud = [torch.where((documents == 0)[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
    attend = over_tokens(on_device, *sight_of(documents, 5))
    quiet = differentiate(attend, (q, k, v, d_mixed))
    beside = differentiate(attend, (*loud, d_mixed))
    assert torch.equal(quiet[0][:, 70:], beside[0][:, 70:])
    for expected, found in zip(quiet[1], beside[1], strict=True):
        assert torch.equal(expected[:, 70:], found[:, 70:])


def test_any_width_of_heads_equals_the_mask():
    documents, generator = ragged(70, batch=1), torch.Generator().manual_seed(70)
    shapes = ((2, 100), (1, 100), (1, 40), (2, 40))
    inputs = [torch.randn(1, 70, *shape, generator=generator) for shape in shapes]
    attend = over_tokens(on_device, *sight_of(documents, 3))
    assert_matches_oracle(attend, inputs, documents, 3, F32)


def test_bfloat16_gives_bfloat16_within_its_rounding():
    inputs, attend = make_inputs(70, torch.bfloat16), segments_of(70, 4)
    assert attend(*inputs[:3]).dtype is torch.bfloat16
    assert_matches_oracle(attend, inputs, one_document(70), 4, torch.bfloat16)


def test_two_runs_are_equal_bit_for_bit():
    documents, inputs = ragged(70), make_inputs(70, F32)
    attend = over_tokens(on_device, *sight_of(documents, 3))
    first, second = (differentiate(attend, inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))
