"""The linear scan's Triton kernels against float64 loops."""

import numpy as np
import pytest
import torch

from kernels.scans.linear_scan import linear_scan
from kernels.triton_launch import interpreting
from tests.kernels.triton.cases import (
    Case,
    assert_case_agrees,
    assert_repeats,
    draw_documents,
    normal,
    to_tensors,
)
from tests.oracles import linear_scan as oracle

SLOW, ORDINARY, STRONG = (1e-5, 1e-3), (1e-3, 3.0), (20.0, 200.0)


def make_case(length, channels=3, batch=2, rates=ORDINARY, ragged=True, half=()):
    generator = np.random.default_rng(length * 1000 + channels)
    shape = (batch, length, channels)
    inputs = {
        "log_decay": -np.exp(generator.uniform(*np.log(rates), size=shape)),
        "values": generator.normal(size=shape),
        "initial": generator.normal(size=(batch, channels)),
    }
    weights = normal(shape, length), normal((batch, channels), length + 1)
    documents = draw_documents(ragged, batch, length)
    return Case(linear_scan, to_tensors(inputs, half=half), documents, weights)


def assert_matches_the_loop(case, dtype=torch.float32):
    states = oracle.scan(case.exact(), case.documents)
    gradients = oracle.gradients(case.exact(), case.documents, *case.weights)
    assert_case_agrees(case, (states, states[:, -1]), gradients, dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_outputs_states_and_every_gradient_match_the_loop(length, ragged):
    assert_matches_the_loop(make_case(length, ragged=ragged))


@pytest.mark.parametrize(("channels", "batch"), [(1, 3), (8, 1), (17, 2)])
def test_any_number_of_channels_and_rows_works(channels, batch):
    assert_matches_the_loop(make_case(70, channels, batch))


def test_wide_tiles_give_what_narrow_ones_give(monkeypatch):
    monkeypatch.setattr("kernels.scans.linear_scan_triton.PROGRAMS", 0)
    assert_matches_the_loop(make_case(40, 33, 1))


@pytest.mark.parametrize("rates", [SLOW, STRONG])
def test_slow_and_strong_decay_match_the_loop(rates):
    assert_matches_the_loop(make_case(1000, 2, 1, rates, ragged=False))


def test_bfloat16_values_match_the_loop():
    case = make_case(65, half=("values",))
    results, gradients = case.run()
    assert results[0].dtype is gradients["values"].dtype is torch.bfloat16
    assert results[1].dtype is torch.float32
    assert_matches_the_loop(case, torch.bfloat16)


@pytest.mark.usefixtures("poisoned")
def test_every_number_that_is_returned_is_written():
    assert_matches_the_loop(make_case(41, 5))


def test_two_runs_agree_bit_by_bit():
    assert_repeats(make_case(65))


@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(spoiled):
    clean, dirty = make_case(70, batch=1), make_case(70, batch=1)
    clean.documents[:] = dirty.documents[:] = (np.arange(70) >= 37).astype(np.int32)
    inside = clean.documents[0] == spoiled
    for name in ("log_decay", "values"):
        dirty.tensors[name][:, inside] = float("nan")
    if spoiled == 0:
        dirty.tensors["initial"][:] = float("nan")
    else:
        clean.weights[1][:] = dirty.weights[1][:] = 0.0
    (expected, expected_gradients), (results, gradients) = clean.run(), dirty.run()
    assert torch.equal(results[0][:, ~inside], expected[0][:, ~inside])
    for name in ("log_decay", "values"):
        assert torch.equal(gradients[name][:, ~inside], expected_gradients[name][:, ~inside])
    if spoiled == 0:
        assert torch.equal(results[1], expected[1])
    else:
        assert torch.equal(gradients["initial"], expected_gradients["initial"])


def test_a_decay_of_one_adds_up_the_values():
    case = make_case(100, ragged=False)
    case.tensors["log_decay"][:] = 0.0
    case.tensors["values"].round_()
    case.tensors["initial"].round_()
    expected = case.tensors["initial"][:, None] + case.tensors["values"].cumsum(1)
    assert torch.equal(case.run()[0][0], expected)


@pytest.mark.skipif(not interpreting(), reason="on a GPU nothing is interpreted")
def test_the_interpreter_gives_the_same_by_slices_and_by_elements(monkeypatch):
    case = make_case(20, 2, 1)
    results, gradients = case.run()
    monkeypatch.undo()
    expected, expected_gradients = case.run()
    assert torch.equal(results[0], expected[0])
    assert all(torch.equal(gradients[name], x) for name, x in expected_gradients.items())
