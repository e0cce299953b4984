"""The selective scan's Triton kernels against float64 loops."""

import numpy as np
import pytest
import torch

from kernels.scans.selective_scan import selective_scan
from tests.kernels.scans.test_skips import assert_adds_the_values
from tests.kernels.triton.cases import (
    DEVICE,
    Case,
    assert_case_agrees,
    assert_repeats,
    draw_documents,
    normal,
    to_tensors,
)
from tests.oracles import selective_scan as oracle

PER_TOKEN = ("values", "dt", "B", "C")
ORDINARY = ((0.001, 0.1), (-16.0, -0.05))


def make_case(length, channels=3, states=3, batch=2, rates=ORDINARY, ragged=True, half=()):
    dt, A = rates
    generator = np.random.default_rng(length * 1000 + channels)
    inputs = {
        "values": generator.normal(size=(batch, length, channels)),
        "dt": np.exp(generator.uniform(*np.log(dt), size=(batch, length, channels))),
        "A": generator.uniform(*A, size=(channels, states)),
        "B": generator.normal(size=(batch, length, states)),
        "C": generator.normal(size=(batch, length, states)),
        "initial": generator.normal(size=(batch, channels, states)),
    }
    weights = normal((batch, length, channels), length), normal((batch, channels, states), 5)
    documents = draw_documents(ragged, batch, length)
    return Case(selective_scan, to_tensors(inputs, half=half), documents, weights)


def assert_matches_the_loop(case, dtype=torch.float32):
    outputs, states = oracle.scan(case.exact(), case.documents)
    gradients = oracle.gradients(case.exact(), case.documents, *case.weights)
    assert_case_agrees(case, (outputs, states[:, -1]), gradients, dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 31, 63, 64, 65])
def test_outputs_states_and_every_gradient_match_the_loop(length, ragged):
    assert_matches_the_loop(make_case(length, ragged=ragged))


@pytest.mark.parametrize("ragged", [False, True])
def test_many_chunks_match_the_loop(ragged):
    assert_matches_the_loop(make_case(1000, 2, 2, 1, ragged=ragged))


@pytest.mark.parametrize(("channels", "states", "batch"), [(1, 1, 3), (5, 16, 1), (33, 2, 1)])
def test_any_number_of_channels_states_and_rows_works(channels, states, batch):
    assert_matches_the_loop(make_case(40, channels, states, batch))


@pytest.mark.parametrize("rates", [((0.001, 0.1), (-0.0501, -0.05)), ((0.1, 20.0), (-16.0, -15.0))])
def test_slow_and_strong_decay_match_the_loop(rates):
    assert_matches_the_loop(make_case(300, 2, 2, 1, rates, ragged=False))


def test_bfloat16_inputs_match_the_loop():
    case = make_case(65, half=("values", "B", "C"))
    results, gradients = case.run()
    assert results[0].dtype is gradients["values"].dtype is gradients["B"].dtype is torch.bfloat16
    assert results[1].dtype is gradients["dt"].dtype is torch.float32
    assert_matches_the_loop(case, torch.bfloat16)


@pytest.mark.usefixtures("poisoned")
def test_every_number_that_is_returned_is_written():
    assert_matches_the_loop(make_case(41, 5))


def test_two_runs_agree_bit_by_bit():
    assert_repeats(make_case(65))


def test_gradient_of_the_final_state_alone_reaches_the_inputs():
    case = make_case(40, ragged=False)
    case = Case(case.operator, case.tensors, case.documents, (case.weights[0] * 0, case.weights[1]))
    assert_matches_the_loop(case)


def test_without_gradients_the_results_are_the_same():
    case = make_case(65)
    expected, _ = case.run()
    with torch.no_grad():
        tensors = {name: x.to(DEVICE) for name, x in case.tensors.items()}
        ids = torch.from_numpy(case.documents).to(DEVICE)
        results = selective_scan(**tensors, documents=ids)
    assert torch.equal(results.outputs.cpu(), expected[0])
    assert torch.equal(results.final.cpu(), expected[1])


@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(spoiled):
    clean, dirty = make_case(70, batch=1), make_case(70, batch=1)
    clean.documents[:] = dirty.documents[:] = (np.arange(70) >= 37).astype(np.int32)
    inside = clean.documents[0] == spoiled
    for name in PER_TOKEN:
        dirty.tensors[name][:, inside] = float("nan")
    if spoiled == 0:
        dirty.tensors["initial"][:] = float("nan")
    else:
        clean.weights[1][:] = dirty.weights[1][:] = 0.0
    (expected, expected_gradients), (results, gradients) = clean.run(), dirty.run()
    assert torch.equal(results[0][:, ~inside], expected[0][:, ~inside])
    for name in PER_TOKEN:
        assert torch.equal(gradients[name][:, ~inside], expected_gradients[name][:, ~inside])
    if spoiled == 0:
        assert torch.equal(results[1], expected[1])
    else:
        assert torch.equal(gradients["initial"], expected_gradients["initial"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_every_gradient_with_D_match_the_loop(dtype):
    assert_adds_the_values("selective_scan", selective_scan, 65, True, dtype, channels=3, states=2)
