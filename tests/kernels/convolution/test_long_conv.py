"""The long convolution against float64 sums, in outputs, every gradient, and what may leak."""

import numpy as np
import pytest
import torch

from kernels.convolution import long_conv as module
from kernels.convolution.long_conv import DIRECT, fast_size, long_conv, long_conv_reference
from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.oracles import long_conv as oracle

EPS = torch.finfo(torch.float32).eps


def make_inputs(length, taps=None, reverse=None, channels=5, batch=2):
    generator = np.random.default_rng(length * 1000 + channels)
    inputs = {
        "values": generator.normal(size=(batch, length, channels)),
        "filter": generator.normal(size=(channels, taps or length)),
    }
    if reverse is not None:
        inputs["reverse_filter"] = generator.normal(size=(channels, reverse))
    return inputs


def make_documents(ragged, batch, length):
    if not ragged:
        return np.zeros((batch, length), dtype=np.int32)
    return ragged_documents(batch, length, np.random.default_rng(length))


def rounded(inputs, dtype):
    tensors = {name: torch.tensor(x, dtype=dtype) for name, x in inputs.items()}
    return tensors, {name: x.double().numpy() for name, x in tensors.items()}


def differentiate(convolve, tensors, documents, d_outputs):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    outputs = convolve(**leaves, documents=documents)
    weighted = (outputs * torch.as_tensor(d_outputs)).sum()
    gradients = torch.autograd.grad(weighted, leaves.values())
    return outputs, dict(zip(leaves, gradients, strict=True))


def assert_matches_oracle(inputs, documents, dtype=torch.float32, convolve=long_conv):
    tensors, inputs = rounded(inputs, dtype)
    d_outputs = np.random.default_rng(3).normal(size=inputs["values"].shape).astype(np.float32)
    expected = oracle.gradients(inputs, documents, d_outputs.astype(np.float64))
    ids = torch.from_numpy(documents) if documents.any() else None
    outputs, gradients = differentiate(convolve, tensors, ids, d_outputs)
    assert outputs.dtype is dtype
    assert_agrees(outputs, oracle.convolve(inputs, documents), "outputs", dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype is dtype
        assert_agrees(gradient, expected[name], "gradients", dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("taps", ["as long", "longer", 1, 7])
@pytest.mark.parametrize("length", [1, 2, 37, DIRECT, DIRECT + 1, 149])
def test_one_direction_matches_the_sum_in_outputs_and_every_gradient(length, taps, ragged):
    count = {"as long": length, "longer": length + 9}.get(taps, taps)
    inputs = make_inputs(length, count)
    assert_matches_oracle(inputs, make_documents(ragged, 2, length))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reverse", ["as long", 1, 12])
@pytest.mark.parametrize("length", [1, 2, 37, DIRECT + 1, 149])
def test_two_directions_match_the_sum_in_outputs_and_every_gradient(length, reverse, ragged):
    count = length if reverse == "as long" else reverse
    inputs = make_inputs(length, 7 if reverse == 12 else length, count)
    assert_matches_oracle(inputs, make_documents(ragged, 2, length))


def test_long_documents_and_short_ones_share_a_row():
    lengths = np.array([70, 3, 64, 1, 130, 65])
    documents = np.stack([np.repeat(np.arange(6), lengths), np.repeat(np.arange(2), [300, 33])])
    inputs = make_inputs(333, 333, 100, channels=2)
    assert_matches_oracle(inputs, documents.astype(np.int32))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reverse", [None, 20])
def test_float64_takes_the_dense_matrix(reverse, ragged):
    inputs, documents = make_inputs(80, 70, reverse), make_documents(ragged, 2, 80)
    assert_matches_oracle(inputs, documents, torch.float64)
    tensors, _ = rounded(inputs, torch.float64)
    ids = torch.from_numpy(documents)
    by_name = long_conv_reference(**tensors, documents=ids)
    assert torch.equal(long_conv(**tensors, documents=ids), by_name)


def test_its_matrix_is_the_toeplitz_one_and_exactly_triangular_in_float64():
    tensors, inputs = rounded(make_inputs(90, 50, 30, channels=2), torch.float64)
    units = torch.eye(90, dtype=torch.float64).unsqueeze(2).expand(90, 90, 2)
    for names in (("filter",), ("filter", "reverse_filter")):
        filters = {name: tensors[name] for name in names}
        matrix = long_conv(units, **filters).permute(2, 1, 0)
        reverse = inputs["reverse_filter"] if len(names) == 2 else np.zeros((2, 0))
        assert np.array_equal(matrix.numpy(), oracle.toeplitz(inputs["filter"], reverse, 90))
    lower = long_conv(units, tensors["filter"]).permute(2, 1, 0)
    assert torch.count_nonzero(torch.triu(lower, diagonal=1)) == 0


@pytest.mark.parametrize("channels", [1, 3, 40])
def test_channels_in_several_parts_give_the_same(channels, monkeypatch):
    monkeypatch.setattr(module, "POINTS", 2 * 256 * 7)
    assert_matches_oracle(make_inputs(100, 100, 50, channels), make_documents(True, 2, 100))
    assert_matches_oracle(make_inputs(100, 100, 50, channels), make_documents(False, 2, 100))


@pytest.mark.parametrize("length", [DIRECT, 300])
@pytest.mark.parametrize("amplitude", [1.0, 1e2, 1e4])
def test_the_future_leaves_no_more_than_rounding(length, amplitude):
    tensors, _ = rounded(make_inputs(length, channels=8), torch.float32)
    values, place = tensors["values"], length // 2
    changed = values.clone()
    changed[:, place:] *= amplitude
    before, after = (long_conv(x, tensors["filter"]) for x in (values, changed))
    leak = (after - before)[:, :place].abs().max()
    norm = tensors["filter"].abs().sum(dim=1).max()
    assert leak <= 4 * EPS * norm * changed.abs().max()
    assert length > DIRECT or leak == 0


@pytest.mark.parametrize("length", [DIRECT, 200])
@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned, length):
    documents = torch.tensor([[0] * (length - 20) + [1] * 20]).int()
    clean, _ = rounded(make_inputs(length, reverse=length, batch=1), torch.float32)
    inside = documents[0] == poisoned
    dirty = {**clean, "values": clean["values"].masked_fill(inside[:, None], float("nan"))}
    d_outputs = torch.ones(1, length, 5).masked_fill(inside[:, None], 0.0)
    expected, wanted = differentiate(long_conv, clean, documents, d_outputs)
    outputs, gradients = differentiate(
        lambda **named: long_conv(**named).masked_fill(inside[:, None], 0.0),
        dirty,
        documents,
        d_outputs,
    )
    assert torch.equal(outputs[:, ~inside], expected[:, ~inside])
    assert torch.equal(gradients["values"][:, ~inside], wanted["values"][:, ~inside])


def test_autocast_changes_nothing():
    tensors, _ = rounded(make_inputs(200, reverse=200), torch.float32)
    expected, wanted = differentiate(long_conv, tensors, None, torch.ones(2, 200, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, gradients = differentiate(long_conv, tensors, None, torch.ones(2, 200, 5))
    assert torch.equal(outputs, expected)
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("length", [DIRECT, 200])
def test_bfloat16_values_keep_a_float32_filter(length):
    tensors, exact = rounded(make_inputs(length), torch.bfloat16)
    tensors = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    taps = tensors["filter"].detach().float().requires_grad_()
    outputs = long_conv(tensors["values"], taps)
    outputs.float().sum().backward()
    documents = np.zeros((2, length), dtype=np.int32)
    assert outputs.dtype is torch.bfloat16
    assert taps.grad is not None
    assert taps.grad.dtype is torch.float32
    assert_agrees(outputs, oracle.convolve(exact, documents), "outputs", torch.bfloat16)
    wanted = oracle.gradients(exact, documents, np.ones(exact["values"].shape))
    assert_agrees(taps.grad, wanted["filter"], "gradients")


@pytest.mark.parametrize("length", [10, 200])
def test_views_with_gaps_give_the_same(length):
    tensors, _ = rounded(make_inputs(length), torch.float32)
    wide = torch.stack([tensors["values"]] * 2, dim=-1)[..., 0]
    turned = tensors["filter"].t().contiguous().t()
    assert torch.equal(long_conv(wide, turned), long_conv(**tensors))


@pytest.mark.parametrize("length", [10, 200])
def test_meta_tensors_give_shapes_forward_and_backward(length):
    tensors, _ = rounded(make_inputs(length, reverse=length), torch.float32)
    leaves = {name: x.to("meta").requires_grad_() for name, x in tensors.items()}
    outputs = long_conv(**leaves)
    outputs.sum().backward()
    assert outputs.shape == (2, length, 5)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves.values())


def test_nothing_that_the_backward_pass_keeps_is_a_spectrum():
    tensors, _ = rounded(make_inputs(300), torch.float32)
    kept = []
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        long_conv(**leaves)
    assert not any(x.is_complex() for x in kept)
    assert sum(x.numel() for x in kept) <= sum(x.numel() for x in leaves.values())


def test_fft_lengths_are_even_large_enough_and_have_small_factors():
    for points in range(1, 3000):
        n = fast_size(points)
        assert points <= n <= max(2, 1.25 * points + 2)
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert (rest, n % 2) == (1, 0)


def test_what_does_not_fit_is_refused():
    tensors, _ = rounded(make_inputs(9), torch.float32)
    with pytest.raises(ValueError, match="at least 1"):
        long_conv(tensors["values"][:, :0], tensors["filter"])
    with pytest.raises(ValueError, match="at least 1"):
        long_conv(tensors["values"], tensors["filter"][:, :0])
    with pytest.raises((ValueError, TypeError)):
        long_conv(tensors["values"], tensors["filter"][:-1])
    with pytest.raises((ValueError, TypeError)):
        long_conv(**tensors, documents=torch.zeros(2, 8, dtype=torch.int32))
