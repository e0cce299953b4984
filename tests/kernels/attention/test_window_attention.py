"""Window attention against masks built pair by pair, in outputs and every gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels.attention.window_attention as kernel
from kernels.attention.window_attention import (
    centred_window_attention,
    window_attention,
    window_attention_reference,
)
from kernels.dispatch import Path
from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.kernels.largest_tensor import LargestTensor
from tests.oracles import local_attention as oracle


def make_inputs(queries, keys=None, dtype=torch.float64, batch=2, heads=4, groups=2, widths=(8, 6)):
    """Queries, keys, values and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(queries)
    S, (P, Q) = keys or queries, widths
    shapes = ((queries, heads, P), (S, groups, P), (S, groups, Q), (queries, heads, Q))
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in shapes]


def ragged(length, batch=2):
    return torch.from_numpy(ragged_documents(batch, length, np.random.default_rng(length)))


def differentiate(attend, inputs, *arguments):
    q, k, v, d_mixed = inputs
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mixed = attend(*leaves, *arguments)
    return mixed, torch.autograd.grad(mixed, leaves, d_mixed.to(mixed.dtype))


def assert_matches_oracle(attend, inputs, mask, *arguments, dtype=torch.float64):
    mixed, gradients = differentiate(attend, inputs, *arguments)
    q, k, v, d_mixed = (x.double().numpy() for x in inputs)
    assert_agrees(mixed, oracle.attend(q, k, v, mask), "outputs", dtype)
    expected = oracle.gradients(q, k, v, mask, d_mixed)
    # A query that sees one key alone has a gradient of zero, up to rounding.
    scale = np.sqrt(np.mean(expected[2] ** 2))
    for found, wanted in zip(gradients, expected, strict=True):
        if np.abs(wanted).max() < 1e-12 * scale:
            assert found.abs().max() < 1e-6 * scale
        else:
            assert_agrees(found, wanted, "gradients", dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, "all", "more"])
@pytest.mark.parametrize("length", [1, 2, 127, 200, 257])
def test_windows_equal_the_mask_in_outputs_and_every_gradient(length, window, dtype):
    window = {"all": length, "more": length + 5}.get(window, window)
    mask = oracle.near(length, np.zeros((2, length), dtype=int), window - 1, 0)
    inputs = make_inputs(length, dtype=dtype, heads=2, groups=1)
    assert_matches_oracle(window_attention, inputs, mask, window, dtype=dtype)


@pytest.mark.parametrize("window", [1, 5, 64, 300])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 90), (65, 70), (130, 260), (7, 193)])
def test_queries_of_the_last_tokens_see_keys_of_earlier_ones(queries, keys, window):
    documents = ragged(keys)
    mask = oracle.near(queries, documents.numpy(), window - 1, 0)
    assert_matches_oracle(window_attention, make_inputs(queries, keys), mask, window, documents)


@pytest.mark.parametrize("window", [1, 3, 64, 65, 400])
@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_centred_windows_equal_the_mask(length, window):
    documents = ragged(length)
    mask = oracle.near(length, documents.numpy(), window - 1, window - 1)
    inputs = make_inputs(length)
    assert_matches_oracle(centred_window_attention, inputs, mask, window, documents)


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("attend", [window_attention, centred_window_attention])
def test_the_cut_into_blocks_changes_nothing(monkeypatch, attend, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    documents, after = ragged(200), 49 if attend is centred_window_attention else 0
    mask = oracle.near(200, documents.numpy(), 49, after)
    assert_matches_oracle(attend, make_inputs(200), mask, 50, documents)


@pytest.mark.parametrize("window", [600, 1300])
@pytest.mark.parametrize("attend", [window_attention, centred_window_attention])
def test_keys_of_several_tiles_equal_the_mask(attend, window):
    documents = torch.tensor([[0] * 1100 + [1] * 100, [0] * 3 + [1] * 1197]).int()
    after = window - 1 if attend is centred_window_attention else 0
    mask = oracle.near(1200, documents.numpy(), window - 1, after)
    inputs = make_inputs(1200, dtype=torch.float32)
    assert_matches_oracle(attend, inputs, mask, window, documents, dtype=torch.float32)


@pytest.mark.parametrize("window", [40, 1500, 2200])
def test_keys_of_several_segments_equal_the_mask(window):
    mask = oracle.near(2200, np.zeros((1, 2200), dtype=int), window - 1, 0)
    inputs = make_inputs(2200, dtype=torch.float32, batch=1, heads=2, groups=1)
    assert_matches_oracle(window_attention, inputs, mask, window, dtype=torch.float32)


@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (3, 3), (4, 1)])
@pytest.mark.parametrize("widths", [(1, 1), (16, 64), (17, 80), (70, 3)])
def test_any_heads_and_widths_equal_the_mask(heads, groups, widths):
    documents = ragged(150)
    inputs = make_inputs(150, dtype=torch.float32, heads=heads, groups=groups, widths=widths)
    mask = oracle.near(150, documents.numpy(), 69, 0)
    assert_matches_oracle(window_attention, inputs, mask, 70, documents, dtype=torch.float32)


def test_scores_that_grow_from_tile_to_tile_keep_their_precision():
    q, k, v, d_mixed = make_inputs(1200, dtype=torch.float32)
    k = k * torch.linspace(0.1, 20, 1200)[:, None, None]
    mask = oracle.near(1200, np.zeros((2, 1200), dtype=int), 1199, 0)
    assert_matches_oracle(window_attention, (q, k, v, d_mixed), mask, 1200, dtype=torch.float32)


def test_the_number_of_threads_does_not_matter():
    inputs, documents = make_inputs(700, dtype=torch.float32), ragged(700)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mixed, gradients = differentiate(window_attention, inputs, 300, documents)
            runs.append((mixed, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("attend", [window_attention, centred_window_attention])
def test_without_a_compiler_windows_equal_the_mask(monkeypatch, attend):
    monkeypatch.setattr(kernel, "path_of", lambda _: Path.REFERENCE)
    documents, after = ragged(200), 49 if attend is centred_window_attention else 0
    mask = oracle.near(200, documents.numpy(), 49, after)
    inputs = make_inputs(200, dtype=torch.float32)
    assert_matches_oracle(attend, inputs, mask, 50, documents, dtype=torch.float32)


def test_padding_at_the_end_of_a_row_is_a_document_of_its_own():
    documents = torch.tensor([[0] * 50 + [1] * 20 + [-1] * 30, [0] * 100])
    mask = oracle.near(100, documents.numpy(), 39, 0)
    assert_matches_oracle(window_attention, make_inputs(100), mask, 40, documents)


def test_the_reference_equals_the_mask():
    documents = ragged(60)
    mask = oracle.near(50, documents.numpy(), 8, 0)
    assert_matches_oracle(window_attention_reference, make_inputs(50, 60), mask, 9, documents)


def test_oracle_gradients_match_finite_differences():
    q, k, v, d_mixed = (x.numpy() for x in make_inputs(9))
    mask = oracle.near(9, ragged(9).numpy(), 3, 0)
    generator = np.random.default_rng(0)
    for number, gradient in enumerate(oracle.gradients(q, k, v, mask, d_mixed)):
        way = generator.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [x + step * way if n == number else x for n, x in enumerate((q, k, v))]
            ends.append((oracle.attend(*moved, mask) * d_mixed).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx((gradient * way).sum(), rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    q, k, v, _ = make_inputs(70, heads=2, groups=1, batch=1)
    leaves = [x[..., :3].clone().requires_grad_() for x in (q, k, v)]
    documents = torch.tensor([[0] * 40 + [1] * 30])
    assert torch.autograd.gradcheck(
        lambda *x: window_attention(*x, 4, documents), leaves, fast_mode=True
    )


@pytest.mark.parametrize("window", [200, 1000])
def test_a_window_as_long_as_the_text_is_causal_attention(window):
    q, k, v, _ = make_inputs(200)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    causal = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert_agrees(window_attention(q, k, v, window), causal.transpose(1, 2), "outputs", q.dtype)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_query_i_sees_exactly_the_smaller_of_i_plus_1_and_the_window(window):
    q, k, _, _ = make_inputs(150, heads=2)
    units = torch.eye(150, dtype=q.dtype)[None, :, None].expand(2, 150, 2, 150)
    seen = (window_attention(q, k, units, window) > 0).sum(dim=-1)
    expected = torch.arange(1, 151).clamp(max=window)
    assert torch.equal(seen, expected[None, :, None].expand_as(seen))


def test_as_many_key_heads_as_queries_and_fewer_equal_repeated_ones():
    q, k, v, _ = make_inputs(90)
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    grouped, full = window_attention(q, k, v, 20), window_attention(q, *repeated, 20)
    assert_agrees(grouped, full, "outputs", torch.float64)


def test_a_document_does_not_feel_huge_values_in_another():
    documents = torch.tensor([[0] * 70 + [1] * 60]).int()
    q, k, v, d_mixed = make_inputs(130, batch=1, dtype=torch.float32)
    loud = [torch.where((documents == 0)[:, :, None, None], 1e4 * x, x) for x in (q, k, v)]
    quiet = differentiate(window_attention, (q, k, v, d_mixed), 50, documents)
    beside = differentiate(window_attention, (*loud, d_mixed), 50, documents)
    assert torch.equal(quiet[0][:, 70:], beside[0][:, 70:])
    for expected, found in zip(quiet[1], beside[1], strict=True):
        assert torch.equal(expected[:, 70:], found[:, 70:])


def test_a_score_that_overflows_is_hidden_from_another_document():
    documents = torch.tensor([[0] * 70 + [1] * 60]).int()
    q, k, v, d_mixed = make_inputs(130, batch=1, dtype=torch.float32)
    first = (documents == 0)[:, :, None, None]
    q = torch.where(first, 0.0, 10 * q)
    loud = torch.where(first, 3e38 * k.sign(), k)
    quiet = differentiate(window_attention, (q, k, v, d_mixed), 50, documents)
    beside = differentiate(window_attention, (q, loud, v, d_mixed), 50, documents)
    assert torch.isinf(torch.einsum("blhp,bsgp->blhsg", q, loud)).any()
    assert torch.equal(quiet[0][:, 70:], beside[0][:, 70:])
    for expected, found in zip(quiet[1], beside[1], strict=True):
        assert torch.equal(expected[:, 70:], found[:, 70:])


def test_autocast_lowers_nothing():
    inputs = make_inputs(100, dtype=torch.float32)
    expected = differentiate(window_attention, inputs, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = differentiate(window_attention, inputs, 30)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


def test_bfloat16_inputs_give_bfloat16_outputs():
    inputs = make_inputs(100, dtype=torch.bfloat16)
    mask = oracle.near(100, np.zeros((2, 100), dtype=int), 29, 0)
    assert window_attention(*inputs[:3], 30).dtype is torch.bfloat16
    assert_matches_oracle(window_attention, inputs, mask, 30, dtype=torch.bfloat16)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attend", [window_attention, centred_window_attention])
def test_no_tensor_grows_with_the_square_of_the_length(attend, packed):
    inputs = make_inputs(4096, dtype=torch.float32, batch=1, heads=2)
    documents = ragged(4096, batch=1) if packed else None
    with LargestTensor() as largest:
        differentiate(attend, inputs, 64, documents)
    assert largest.numbers <= 4096 * 4096 / 16


def test_backward_keeps_no_probabilities():
    q, k, v, _ = make_inputs(500, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        window_attention(q.requires_grad_(), k, v, 64)
    outputs, logs, ends = v.shape[0] * 500 * 4 * 6, v.shape[0] * 500 * 4, 2 * v.shape[0] * 500
    assert sum(kept) == q.numel() + k.numel() + v.numel() + outputs + logs + ends


def test_work_in_plain_torch_is_linear_in_the_length():
    counts = []
    for length in (1024, 2048, 3072):
        with FlopCounterMode(display=False) as counter:
            window_attention(*make_inputs(length)[:3], 128)
        counts.append(counter.get_total_flops())
    assert counts[2] - counts[1] == counts[1] - counts[0]
    each = 2 * 2 * 4 * (8 + 6)
    assert counts[1] <= 1.5 * each * 2048 * 128


def test_meta_tensors_give_shapes_forward_and_backward():
    leaves = [x.to("meta").requires_grad_() for x in make_inputs(90)[:3]]
    mixed = window_attention(*leaves, 20)
    mixed.sum().backward()
    assert mixed.shape == (2, 90, 4, 6)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def test_too_few_keys_and_empty_windows_are_refused():
    q, k, v, _ = make_inputs(9)
    with pytest.raises(ValueError, match="window 0 with 9 queries on 9 keys; take a window of 1"):
        window_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        window_attention(q, k[:, 1:], v[:, 1:], 4)
    with pytest.raises(ValueError, match="window 0 is empty"):
        centred_window_attention(q, k, v, 0)
