"""The causal convolution's Triton kernels against float64 loops."""

import numpy as np
import pytest
import torch

from kernels.convolution.causal_conv import causal_conv
from tests.kernels.triton.cases import (
    Case,
    assert_case_agrees,
    assert_repeats,
    draw_documents,
    normal,
    to_tensors,
)
from tests.oracles import causal_conv as oracle


def make_case(length, width=4, channels=3, batch=2, ragged=True, half=()):
    shapes = {
        "values": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial": (batch, width - 1, channels),
    }
    inputs = {name: normal(shape, length + i) for i, (name, shape) in enumerate(shapes.items())}
    weights = normal(shapes["values"], 3), None
    documents = draw_documents(ragged, batch, length)
    return Case(causal_conv, to_tensors(inputs, half=half), documents, weights)


def assert_matches_the_loop(case, dtype=torch.float32):
    outputs = oracle.convolve(case.exact(), case.documents)
    gradients = oracle.gradients(case.exact(), case.documents, case.weights[0])
    assert_case_agrees(case, (outputs, None), gradients, dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 1000])
def test_outputs_and_every_gradient_match_the_loop(length, ragged):
    assert_matches_the_loop(make_case(length, ragged=ragged))


@pytest.mark.parametrize("width", [1, 2, 7, 11])
def test_any_number_of_taps_works(width):
    assert_matches_the_loop(make_case(40, width))


@pytest.mark.parametrize(("channels", "batch"), [(1, 3), (65, 1)])
def test_any_number_of_channels_and_rows_works(channels, batch):
    assert_matches_the_loop(make_case(33, 4, channels, batch))


def test_bfloat16_values_match_the_loop():
    case = make_case(65, half=("values",))
    results, gradients = case.run()
    assert results[0].dtype is gradients["values"].dtype is torch.bfloat16
    assert gradients["weight"].dtype is torch.float32
    assert_matches_the_loop(case, torch.bfloat16)


@pytest.mark.usefixtures("poisoned")
def test_every_number_that_is_returned_is_written():
    assert_matches_the_loop(make_case(41, channels=5))


def test_two_runs_agree_bit_by_bit():
    assert_repeats(make_case(65))


def test_without_carried_inputs_zeros_precede():
    case = make_case(9, ragged=False)
    case.tensors["initial"][:] = 0.0
    expected, expected_gradients = case.run()
    del case.tensors["initial"]
    results, gradients = case.run()
    assert torch.equal(results[0], expected[0])
    assert torch.equal(gradients["values"], expected_gradients["values"])


@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(spoiled):
    clean, dirty = make_case(70, batch=1), make_case(70, batch=1)
    clean.documents[:] = dirty.documents[:] = (np.arange(70) >= 37).astype(np.int32)
    inside = clean.documents[0] == spoiled
    dirty.tensors["values"][:, inside] = float("nan")
    dirty.weights[0][:, inside] = float("nan")
    if spoiled == 0:
        dirty.tensors["initial"][:] = float("nan")
    (expected, expected_gradients), (results, gradients) = clean.run(), dirty.run()
    assert torch.equal(results[0][:, ~inside], expected[0][:, ~inside])
    assert torch.equal(gradients["values"][:, ~inside], expected_gradients["values"][:, ~inside])
    if spoiled == 1:
        assert torch.equal(gradients["initial"], expected_gradients["initial"])
