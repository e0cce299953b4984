"""Silu behind the causal convolution against float64 loops, in parts and every gradient."""

import numpy as np
import pytest
import torch

from kernels.convolution.silu_conv import silu_conv
from tests.kernels.agreement import assert_agrees, needs_kernel
from tests.kernels.convolution.test_causal_conv import INPUTS, make_documents, make_inputs, rounded
from tests.oracles import causal_conv as oracle


def expected_of(inputs, documents, d_outputs):
    """Outputs and gradients by name, in float64."""
    before = oracle.convolve(inputs, documents)
    share = 1 / (1 + np.exp(-before))
    d_before = d_outputs * (share + before * share * (1 - share))
    return before * share, oracle.gradients(inputs, documents, d_before)


def differentiate(tensors, documents, d_outputs, sizes):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    ids = None if documents is None else torch.from_numpy(documents)
    parts = silu_conv(**leaves, documents=ids, sizes=sizes)
    outputs = torch.cat(parts, dim=-1)
    gradients = torch.autograd.grad((outputs * torch.as_tensor(d_outputs)).sum(), leaves.values())
    return parts, outputs, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("width", [1, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 200])
def test_parts_match_the_loop_in_outputs_and_every_gradient(length, width, ragged):
    inputs, sizes = make_inputs(length, width, channels=151), [130, 1, 20]
    documents = make_documents(ragged, 2, length)
    tensors, exact = rounded(inputs, torch.float32)
    d_outputs = np.random.default_rng(3).normal(size=exact["values"].shape).astype(np.float32)
    expected, expected_gradients = expected_of(exact, documents, d_outputs.astype(np.float64))
    parts, outputs, gradients = differentiate(tensors, documents, d_outputs, sizes)
    assert [part.shape[-1] for part in parts] == sizes
    assert_agrees(outputs, expected, "outputs")
    for name in INPUTS:
        assert_agrees(gradients[name], expected_gradients[name], "gradients")


@needs_kernel
def test_parts_lie_by_themselves():
    tensors, _ = rounded(make_inputs(9), torch.float32)
    assert all(part.is_contiguous() for part in silu_conv(**tensors, sizes=[20, 4]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_keep_the_dtype(dtype):
    tensors, exact = rounded(make_inputs(70), dtype)
    documents = make_documents(True, 2, 70)
    weights = np.ones(exact["values"].shape)
    expected, expected_gradients = expected_of(exact, documents, weights)
    parts, outputs, gradients = differentiate(tensors, documents, weights, [24])
    assert parts[0].dtype is dtype
    assert_agrees(outputs, expected, "outputs", dtype)
    for name in INPUTS:
        assert_agrees(gradients[name], expected_gradients[name], "gradients", dtype)


def test_without_carried_inputs_zeros_precede():
    tensors, _ = rounded(make_inputs(9), torch.float32)
    zeros = {**tensors, "initial": torch.zeros_like(tensors["initial"])}
    del tensors["initial"]
    weights = np.ones((2, 9, 24), dtype=np.float32)
    _, expected, expected_gradients = differentiate(zeros, None, weights, [24])
    _, outputs, gradients = differentiate(tensors, None, weights, [24])
    assert torch.equal(outputs, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned):
    documents = np.array([[0] * 21 + [1] * 20], dtype=np.int32)
    clean, _ = rounded(make_inputs(41, batch=1), torch.float32)
    inside = documents[0] == poisoned
    weights = np.ones((1, 41, 24), dtype=np.float32)
    dirty = {**clean, "values": clean["values"].clone()}
    dirty["values"][:, inside] = torch.nan
    _, expected, expected_gradients = differentiate(clean, documents, weights, [24])
    _, outputs, gradients = differentiate(dirty, documents, weights, [24])
    assert outputs[:, inside].isnan().all()
    assert torch.equal(outputs[:, ~inside], expected[:, ~inside])
    assert torch.equal(gradients["values"][:, ~inside], expected_gradients["values"][:, ~inside])


@needs_kernel
def test_result_does_not_depend_on_the_number_of_threads():
    tensors, _ = rounded(make_inputs(300, channels=150, batch=3), torch.float32)
    documents = make_documents(True, 3, 300)
    weights = np.random.default_rng(3).normal(size=(3, 300, 150)).astype(np.float32)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(tensors, documents, weights, [100, 50]))
    finally:
        torch.set_num_threads(before)
    _, expected, expected_gradients = runs[0]
    for _, outputs, gradients in runs[1:]:
        assert torch.equal(outputs, expected)
        assert all(torch.equal(gradients[name], expected_gradients[name]) for name in INPUTS)


@needs_kernel
def test_operators_promise_the_shapes_that_they_return():
    tensors, _ = rounded(make_inputs(9), torch.float32)
    forward, backward = (
        getattr(torch.ops.crossladder, f"silu_conv_{way}") for way in ("forward", "backward")
    )
    inputs = (*tensors.values(), None)
    parts = forward(*inputs, [20, 4])
    torch.library.opcheck(forward, (*inputs, [20, 4]), test_utils="test_faketensor")
    torch.library.opcheck(backward, (parts, *inputs), test_utils="test_faketensor")


def test_parts_that_are_not_all_channels_are_refused():
    tensors, _ = rounded(make_inputs(9), torch.float32)
    with pytest.raises(ValueError, match=r"24 channels to split into \[20, 3\]"):
        silu_conv(**tensors, sizes=[20, 3])
    with pytest.raises((ValueError, TypeError)):
        silu_conv(**{**tensors, "initial": tensors["initial"][:, :-1]}, sizes=[24])
