"""SSD across documents and pieces: what a document does not feel of another."""

import pytest
import torch

from kernels.scans.ssd import ssd
from tests.kernels.agreement import assert_agrees
from tests.kernels.scans.ssd_cases import (
    INPUTS,
    differentiate,
    make_documents,
    make_inputs,
    rounded,
    weights,
)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cut", [1, 40, 64, 120])
def test_a_split_with_the_state_carried_equals_the_whole(cut, ragged):
    inputs, _ = rounded(make_inputs(150), torch.float32)
    documents = torch.from_numpy(make_documents(ragged, 2, 150))
    d_outputs, d_final = weights(inputs, 150)

    def in_two_pieces(values, dt, A, B, C, initial, documents):
        first = ssd(
            values[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], initial, documents[:, :cut]
        )
        ids = documents[:, cut:] - documents[:, cut - 1 : cut]
        second = ssd(values[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], first.final, ids)
        return second._replace(outputs=torch.cat([first.outputs, second.outputs], dim=1))

    whole, expected = differentiate(ssd, inputs, documents, d_outputs, d_final)
    split, gradients = differentiate(in_two_pieces, inputs, documents, d_outputs, d_final)
    assert_agrees(split.outputs, whole.outputs, "outputs")
    assert_agrees(split.final, whole.final, "outputs")
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients")


def test_first_token_of_another_document_ignores_the_initial_state():
    inputs, _ = rounded(make_inputs(70), torch.float32)
    documents = torch.full((2, 70), 3).int()
    with_state = ssd(**inputs, documents=documents)
    without = ssd(**{**inputs, "initial": None}, documents=documents)
    assert torch.equal(with_state.outputs, without.outputs)
    assert torch.equal(with_state.final, without.final)


def test_huge_steps_in_one_document_leave_the_other_untouched():
    documents = torch.tensor([[0] * 41 + [1] * 60]).int()
    inputs, _ = rounded(make_inputs(101, batch=1), torch.float32)
    loud = {name: x.clone() for name, x in inputs.items()}
    for name in ("values", "dt", "B", "C"):
        loud[name][:, :41] *= 1e5
    quiet, beside = (ssd(**x, documents=documents) for x in (inputs, loud))
    assert torch.equal(quiet.outputs[:, 41:], beside.outputs[:, 41:])
    assert torch.equal(quiet.final, beside.final)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned):
    documents = torch.tensor([[0] * 41 + [1] * 60]).int()
    clean, _ = rounded(make_inputs(101, batch=1), torch.float32)
    inside = documents[0] == poisoned
    dirty = {name: x.clone() for name, x in clean.items()}
    for name in ("values", "dt", "B", "C"):
        dirty[name][:, inside] = float("nan")
    if poisoned == 0:
        dirty["initial"][:] = float("nan")
    d_outputs, d_final = weights(clean, 101)
    expected, expected_gradients = differentiate(ssd, clean, documents, d_outputs, d_final)
    result, gradients = differentiate(ssd, dirty, documents, d_outputs, d_final)
    assert torch.equal(result.outputs[:, ~inside], expected.outputs[:, ~inside])
    assert result.outputs[:, inside].isnan().all()
    assert result.final.isnan().all() if poisoned else torch.equal(result.final, expected.final)
    for name in ("values", "dt", "B", "C") if poisoned == 0 else ():
        assert torch.equal(gradients[name][:, ~inside], expected_gradients[name][:, ~inside])


def test_a_nan_state_spoils_the_document_that_goes_on_with_it_alone():
    documents = torch.tensor([[0] * 41 + [1] * 60, [1] * 101]).int()
    inputs, _ = rounded(make_inputs(101), torch.float32)
    wanted = ssd(**inputs, documents=documents).outputs
    inputs["initial"][:] = float("nan")
    outputs = ssd(**inputs, documents=documents).outputs
    assert outputs[0, :41].isnan().all()
    assert torch.equal(outputs[0, 41:], wanted[0, 41:])
    assert torch.equal(outputs[1], wanted[1])
