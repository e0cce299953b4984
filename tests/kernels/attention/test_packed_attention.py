"""Packed attention against masks built pair by pair, in outputs and every gradient."""

import pytest
import torch

import kernels.attention.packed_attention as module
from kernels.attention.packed_attention import (
    packed_attention,
    packed_attention_reference,
    serves_one_document,
)
from tests.kernels.agreement import assert_agrees
from tests.kernels.attention.test_window_attention import (
    assert_matches_oracle,
    differentiate,
    make_inputs,
    ragged,
)
from tests.kernels.largest_tensor import LargestTensor
from tests.oracles import local_attention as oracle


def causal(q, k, v, documents):
    return packed_attention(q, k, v, documents, causal=True)


def two_sided(q, k, v, documents):
    return packed_attention(q, k, v, documents, causal=False)


def reference(q, k, v, documents):
    return packed_attention_reference(q, k, v, documents, causal=True)


def filled_up(documents):
    """The first row with padding at its end."""
    documents[0, -(documents.shape[1] // 4) - 1 :] = -1
    return documents


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_rows_of_documents_and_padding_equal_the_mask(length, dtype):
    documents = filled_up(ragged(length))
    inputs = make_inputs(length, dtype=dtype)
    for attend, after in ((causal, 0), (two_sided, length)):
        mask = oracle.near(length, documents.numpy(), length, after)
        assert_matches_oracle(attend, inputs, mask, documents, dtype=dtype)


@pytest.mark.parametrize(("queries", "keys"), [(1, 60), (16, 90), (17, 20), (90, 193)])
def test_queries_of_the_last_tokens_see_keys_of_earlier_ones(queries, keys):
    documents = ragged(keys)
    documents[1] = 0
    mask = oracle.near(queries, documents.numpy(), keys, 0)
    assert_matches_oracle(causal, make_inputs(queries, keys), mask, documents)


def test_the_reference_equals_the_mask():
    documents = ragged(60)
    mask = oracle.near(50, documents.numpy(), 60, 0)
    assert_matches_oracle(reference, make_inputs(50, 60), mask, documents)


def test_not_even_nan_gets_from_one_document_into_another():
    documents = torch.tensor([[0] * 30 + [1] * 40]).int()
    inputs = make_inputs(70, batch=1, dtype=torch.float32)
    expected = differentiate(causal, inputs, documents)
    for x in inputs:
        x[:, :30] = torch.nan
    found = differentiate(causal, inputs, documents)
    assert torch.equal(found[0][:, 30:], expected[0][:, 30:])
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert torch.equal(gradient[:, 30:], wanted[:, 30:])


@pytest.mark.parametrize("queries", [2048, 1500])
def test_no_tensor_grows_with_the_square_of_the_length(queries):
    inputs = make_inputs(queries, 2048, dtype=torch.float32, batch=1, heads=2, groups=1)
    documents = torch.arange(4, dtype=torch.int32).repeat_interleave(512)[None]
    with LargestTensor() as largest:
        differentiate(causal, inputs, documents)
    assert largest.numbers <= 2048 * 2048 / 8


def test_bfloat16_inputs_give_bfloat16_outputs():
    documents, inputs = ragged(100), make_inputs(100, dtype=torch.bfloat16)
    mask = oracle.near(100, documents.numpy(), 100, 0)
    assert causal(*inputs[:3], documents).dtype is torch.bfloat16
    expected = oracle.attend(*(x.double().numpy() for x in inputs[:3]), mask)
    assert_agrees(causal(*inputs[:3], documents), expected, "outputs", torch.bfloat16)


def test_too_few_keys_and_hidden_queries_are_refused():
    q, k, v, _ = make_inputs(9)
    with pytest.raises(ValueError, match="9 queries on 8 keys; give at least as many keys"):
        causal(q, k[:, 1:], v[:, 1:], torch.zeros(2, 8).int())
    with pytest.raises(ValueError, match="as many where attention is not causal"):
        two_sided(q[:, 1:], k, v, torch.zeros(2, 9).int())


def test_the_kernel_serves_one_document_where_it_is_the_faster(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEYS", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    queries, keys, *_ = make_inputs(100, dtype=torch.float32, batch=2, heads=8, groups=2)
    assert serves_one_document(queries, keys)
    assert not serves_one_document(queries.double(), keys.double())
    assert not serves_one_document(*make_inputs(101, dtype=torch.float32, heads=8, groups=2)[:2])
    # Three tasks for four threads, where query heads would make twelve.
    queries, keys, *_ = make_inputs(100, dtype=torch.float32, batch=3, heads=4, groups=1)
    assert not serves_one_document(queries, keys)
    # No more query heads than key heads: torch's has as few.
    assert serves_one_document(queries[:, :, :1], keys)
