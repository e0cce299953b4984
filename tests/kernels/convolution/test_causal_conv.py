"""The causal convolution against float64 loops, in outputs, carried inputs and every gradient."""

import numpy as np
import pytest
import torch

from kernels.convolution.causal_conv import causal_conv, causal_conv_reference
from tests.kernels.agreement import assert_agrees, needs_kernel, ragged_documents
from tests.oracles import causal_conv as oracle

INPUTS = ("values", "weight", "bias", "initial")


def make_inputs(length, width=4, channels=24, batch=2):
    generator = np.random.default_rng(length * 1000 + channels * 10 + width)
    shapes = {
        "values": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial": (batch, width - 1, channels),
    }
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def make_documents(ragged, batch, length):
    if not ragged:
        return np.zeros((batch, length), dtype=np.int32)
    return ragged_documents(batch, length, np.random.default_rng(length))


def rounded(inputs, dtype):
    tensors = {name: torch.tensor(x, dtype=dtype) for name, x in inputs.items()}
    return tensors, {name: x.double().numpy() for name, x in tensors.items()}


def weights(inputs):
    return np.random.default_rng(3).normal(size=inputs["values"].shape).astype(np.float32)


def differentiate(convolve, tensors, documents, d_outputs):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    result = convolve(**leaves, documents=documents)
    weighted = (result.outputs * torch.as_tensor(d_outputs)).sum()
    gradients = torch.autograd.grad(weighted, leaves.values())
    return result, dict(zip(INPUTS, gradients, strict=True))


def assert_matches_oracle(convolve, inputs, documents, dtype):
    tensors, inputs = rounded(inputs, dtype)
    d_outputs = weights(inputs)
    expected = oracle.gradients(inputs, documents, d_outputs.astype(np.float64))
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(convolve, tensors, ids, d_outputs)
    assert_agrees(result.outputs, oracle.convolve(inputs, documents), "outputs", dtype)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 200])
def test_kernel_matches_the_loop_in_outputs_and_every_gradient(length, width, ragged):
    documents = make_documents(ragged, 2, length)
    assert_matches_oracle(causal_conv, make_inputs(length, width), documents, torch.float32)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_reference_matches_the_loop_in_float64(width, ragged):
    documents = make_documents(ragged, 2, 20)
    inputs = make_inputs(20, width)
    assert_matches_oracle(causal_conv_reference, inputs, documents, torch.float64)


@pytest.mark.parametrize("channels", [1, 16, 17, 100])
def test_any_number_of_channels_works(channels):
    documents = make_documents(True, 3, 10)
    inputs = make_inputs(10, 4, channels, batch=3)
    assert_matches_oracle(causal_conv, inputs, documents, torch.float32)


def test_oracle_gradients_match_finite_differences():
    inputs = make_inputs(6, width=3, channels=2)
    documents = make_documents(True, 2, 6)
    d_outputs = weights(inputs).astype(np.float64)
    expected = oracle.gradients(inputs, documents, d_outputs)
    generator = np.random.default_rng(0)
    for name in INPUTS:
        direction = generator.normal(size=inputs[name].shape)
        up, down = (
            (
                oracle.convolve({**inputs, name: inputs[name] + step * direction}, documents)
                * d_outputs
            ).sum()
            for step in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == pytest.approx((expected[name] * direction).sum(), rel=1e-6)


def test_without_carried_inputs_zeros_precede():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    zeros = {**inputs, "initial": torch.zeros_like(inputs["initial"])}
    del inputs["initial"]
    assert torch.equal(causal_conv(**inputs).outputs, causal_conv(**zeros).outputs)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned):
    documents = torch.tensor([[0] * 21 + [1] * 20]).int()
    clean, _ = rounded(make_inputs(41, batch=1), torch.float32)
    inside = documents[0] == poisoned
    d_outputs = weights(clean)
    dirty = {name: x.clone() for name, x in clean.items()}
    dirty["values"][:, inside] = float("nan")
    expected, expected_gradients = differentiate(causal_conv, clean, documents, d_outputs)
    d_dirty = np.where(inside[None, :, None], np.float32("nan"), d_outputs)
    result, gradients = differentiate(causal_conv, dirty, documents, d_dirty)
    assert torch.equal(result.outputs[:, ~inside], expected.outputs[:, ~inside])
    assert torch.equal(gradients["values"][:, ~inside], expected_gradients["values"][:, ~inside])
    if poisoned == 0:
        assert torch.equal(result.final, expected.final)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 20, 39, 40])
def test_a_split_with_the_inputs_carried_equals_the_whole(cut, ragged):
    inputs, _ = rounded(make_inputs(41), torch.float32)
    documents = torch.from_numpy(make_documents(ragged, 2, 41))
    d_outputs = weights(inputs)

    def in_two_pieces(values, weight, bias, initial, documents):
        first = causal_conv(values[:, :cut], weight, bias, initial, documents[:, :cut])
        continued = documents[:, cut:] - documents[:, cut - 1 : cut]
        second = causal_conv(values[:, cut:], weight, bias, first.final, continued)
        return second._replace(outputs=torch.cat([first.outputs, second.outputs], dim=1))

    whole, expected = differentiate(causal_conv, inputs, documents, d_outputs)
    split, gradients = differentiate(in_two_pieces, inputs, documents, d_outputs)
    assert torch.equal(split.outputs, whole.outputs)
    assert torch.equal(split.final, whole.final)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients")


def test_result_does_not_depend_on_the_number_of_threads():
    inputs, _ = rounded(make_inputs(300, channels=50, batch=3), torch.float32)
    documents = torch.from_numpy(make_documents(True, 3, 300))
    d_outputs = weights(inputs)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(causal_conv, inputs, documents, d_outputs))
    finally:
        torch.set_num_threads(before)
    for result, gradients in runs[1:]:
        assert torch.equal(result.outputs, runs[0][0].outputs)
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in INPUTS)


def test_bfloat16_inputs_give_bfloat16_outputs():
    inputs, exact = rounded(make_inputs(65), torch.bfloat16)
    documents = make_documents(True, 2, 65)
    expected = oracle.gradients(exact, documents, weights(exact).astype(np.float64))
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(causal_conv, inputs, ids, weights(exact))
    assert result.outputs.dtype is torch.bfloat16
    assert_agrees(result.outputs, oracle.convolve(exact, documents), "outputs", torch.bfloat16)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", torch.bfloat16)


def test_meta_tensors_give_shapes_forward_and_backward():
    inputs, _ = rounded(make_inputs(70), torch.float32)
    leaves = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    result = causal_conv(**leaves)
    result.outputs.sum().backward()
    assert result.outputs.shape == (2, 70, 24)
    assert result.final.shape == (2, 3, 24)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves.values())


@needs_kernel
def test_operators_promise_the_shapes_that_they_return():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    arguments = (*inputs.values(), None)
    outputs = torch.ops.crossladder.causal_conv_forward(*arguments)
    torch.library.opcheck(
        torch.ops.crossladder.causal_conv_forward, arguments, test_utils="test_faketensor"
    )
    values, weight, _, initial, _ = arguments
    torch.library.opcheck(
        torch.ops.crossladder.causal_conv_backward,
        (outputs, values, weight, initial, None),
        test_utils="test_faketensor",
    )


def test_no_tokens_and_wrong_shapes_are_refused():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    with pytest.raises(ValueError, match="at least 1"):
        causal_conv(**{**inputs, "values": inputs["values"][:, :0]})
    with pytest.raises((ValueError, TypeError)):
        causal_conv(**{**inputs, "initial": inputs["initial"][:, :-1]})
