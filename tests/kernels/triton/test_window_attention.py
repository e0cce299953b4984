"""Window and packed attention's Triton kernels against float64 masks, outputs and gradients."""

import numpy as np
import pytest
import torch

from kernels.attention.interval_attention import Intervals, interval_attention
from kernels.attention.packed_attention import packed_attention
from kernels.attention.window_attention import centred_window_attention, window_attention
from tests.kernels.attention.test_window_attention import (
    assert_matches_oracle,
    differentiate,
    ragged,
)
from tests.kernels.triton.cases import DEVICE
from tests.oracles import local_attention as oracle

pytestmark = pytest.mark.usefixtures("poisoned")


def make_inputs(queries, keys=None, dtype=torch.float32, batch=2, heads=2, groups=1, width=5):
    """Queries, keys, values and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(queries)
    S = keys or queries
    shapes = ((queries, heads, width), (S, groups, width), (S, groups, 3), (queries, heads, 3))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def on_device(attend):
    """The function on the device that the kernels run on, from and to the CPU."""

    def run(q, k, v, *arguments):
        moved = (x.to(DEVICE) if torch.is_tensor(x) else x for x in (q, k, v, *arguments))
        return attend(*moved).cpu()

    return run


window = on_device(window_attention)
centred = on_device(centred_window_attention)
packed = on_device(lambda *x: packed_attention(*x, causal=True))
two_sided = on_device(lambda *x: packed_attention(*x, causal=False))


@pytest.mark.parametrize("width", [1, 5, 64, 65, 2000])
@pytest.mark.parametrize("length", [63, 65, 130])
def test_windows_equal_the_mask_in_outputs_and_every_gradient(length, width):
    mask = oracle.near(length, np.zeros((2, length), dtype=int), width - 1, 0)
    assert_matches_oracle(window, make_inputs(length), mask, width, dtype=torch.float32)


@pytest.mark.parametrize("length", [1, 63, 64, 1000])
def test_documents_equal_the_mask_at_any_length(length):
    documents, inputs = ragged(length, batch=1), make_inputs(length, batch=1, heads=1)
    mask = oracle.near(length, documents.numpy(), length, 0)
    assert_matches_oracle(packed, inputs, mask, documents, dtype=torch.float32)


def test_queries_see_later_tokens_of_their_document_where_they_may():
    documents, inputs = ragged(70), make_inputs(70)
    mask = oracle.near(70, documents.numpy(), 70, 70)
    assert_matches_oracle(two_sided, inputs, mask, documents, dtype=torch.float32)


def test_centred_windows_equal_the_mask():
    documents = ragged(100)
    mask = oracle.near(100, documents.numpy(), 6, 6)
    arguments = (7, documents)
    assert_matches_oracle(centred, make_inputs(100), mask, *arguments, dtype=torch.float32)


def test_queries_of_the_last_tokens_see_keys_of_earlier_ones():
    documents = ragged(150)
    documents[1] = 0
    mask = oracle.near(70, documents.numpy(), 49, 0)
    arguments = (50, documents)
    assert_matches_oracle(window, make_inputs(70, 150), mask, *arguments, dtype=torch.float32)


def test_padding_at_the_end_of_a_row_is_a_document_of_its_own():
    documents = torch.tensor([[0] * 40 + [1] * 20 + [-1] * 20, [0] * 80])
    mask = oracle.near(80, documents.numpy(), 80, 0)
    assert_matches_oracle(packed, make_inputs(80), mask, documents, dtype=torch.float32)


@pytest.mark.parametrize(
    ("heads", "groups", "width"), [(6, 3, 16), (3, 3, 17), (4, 1, 40), (2, 1, 70)]
)
def test_any_heads_and_widths_equal_the_mask(heads, groups, width):
    documents = ragged(70)
    inputs = make_inputs(70, heads=heads, groups=groups, width=width)
    mask = oracle.near(70, documents.numpy(), 70, 0)
    assert_matches_oracle(packed, inputs, mask, documents, dtype=torch.float32)


def test_bfloat16_gives_bfloat16_within_its_rounding():
    documents, inputs = ragged(100), make_inputs(100, dtype=torch.bfloat16)
    mask = oracle.near(100, documents.numpy(), 29, 0)
    assert window(*inputs[:3], 30, documents).dtype is torch.bfloat16
    assert_matches_oracle(window, inputs, mask, 30, documents, dtype=torch.bfloat16)


def test_large_scores_neither_overflow_nor_lose_the_softmax():
    inputs = [x * s for x, s in zip(make_inputs(70), (30, 30, 1, 1), strict=True)]
    mask = oracle.near(70, np.zeros((2, 70), dtype=int), 70, 0)
    mixed, _ = differentiate(window, inputs, 70)
    expected = oracle.attend(*(x.double().numpy() for x in inputs[:3]), mask)
    assert np.abs(mixed.detach().double().numpy() - expected).max() < 1e-3


def test_a_document_does_not_feel_huge_values_in_another():
    documents = torch.tensor([[0] * 70 + [1] * 40]).int()
    q, k, v, d_mixed = make_inputs(110, batch=1)
    loud = [torch.where((documents == 0)[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
    quiet = differentiate(packed, (q, k, v, d_mixed), documents)
    beside = differentiate(packed, (*loud, d_mixed), documents)
    assert torch.equal(quiet[0][:, 70:], beside[0][:, 70:])
    for expected, found in zip(quiet[1], beside[1], strict=True):
        assert torch.equal(expected[:, 70:], found[:, 70:])


def test_two_runs_are_equal_bit_for_bit():
    documents, inputs = ragged(130), make_inputs(130)
    first, second = (differentiate(packed, inputs, documents) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


def test_a_query_that_sees_nothing_gets_zeros_and_gives_none():
    q, k, v, d_mixed = (x.to(DEVICE) for x in make_inputs(20, batch=1))
    nothing = torch.zeros(1, 20, dtype=torch.int32, device=DEVICE)
    mixed, gradients = differentiate(
        interval_attention, (q, k, v, d_mixed), Intervals(nothing, nothing)
    )
    assert mixed.abs().max() == 0
    assert all(x.abs().max() == 0 for x in gradients)
