"""SSD's Triton kernels against float64 loops: outputs, final states and every gradient."""

import numpy as np
import pytest
import torch

from kernels.scans.ssd import ssd
from kernels.triton_launch import recording
from tests.kernels.agreement import assert_agrees
from tests.kernels.scans.ssd_cases import (
    INPUTS,
    assert_matches_oracle,
    differentiate,
    make_documents,
    make_inputs,
    rounded,
    weights,
)
from tests.kernels.scans.test_skips import assert_adds_the_values
from tests.oracles import ssd as oracle


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 130])
def test_kernels_match_the_loop_in_outputs_and_every_gradient(length, ragged, poisoned):
    inputs = make_inputs(length, heads=1, groups=1, batch=1 + ragged)
    documents = make_documents(ragged, 1 + ragged, length)
    assert_matches_oracle(ssd, inputs, documents, torch.float32)


def test_a_long_sequence_matches_the_loop(poisoned):
    inputs = make_inputs(1000, heads=1, width=3, groups=1, states=2, batch=1)
    assert_matches_oracle(ssd, inputs, make_documents(False, 1, 1000), torch.float32)


@pytest.mark.parametrize(
    ("heads", "width", "groups", "states"),
    [(1, 1, 1, 1), (2, 3, 2, 5), (4, 2, 2, 17), (11, 2, 1, 3), (1, 35, 1, 33)],
)
def test_any_heads_groups_widths_and_states_work(heads, width, groups, states, poisoned):
    inputs = make_inputs(20, heads, width, groups, states, batch=1)
    assert_matches_oracle(ssd, inputs, make_documents(True, 1, 20), torch.float32)


@pytest.mark.parametrize(("dt", "A"), [((0.1, 20.0), -16.0), ((1e-3, 0.1), -0.05)])
def test_strong_and_slow_decays_match_the_loop(dt, A):
    inputs = make_inputs(150, heads=1, groups=1, batch=1, dt=dt)
    inputs["A"][:] = A
    assert_matches_oracle(ssd, inputs, make_documents(False, 1, 150), torch.float32)


def test_bfloat16_values_give_float32_states_and_bfloat16_outputs():
    inputs, exact = rounded(make_inputs(100, heads=2, groups=1, batch=1), torch.bfloat16)
    documents = make_documents(True, 1, 100)
    _, states = oracle.scan(exact, documents)
    result = ssd(**inputs, documents=torch.from_numpy(documents))
    assert result.outputs.dtype is torch.bfloat16
    assert_agrees(result.final, states[:, -1], "outputs", torch.float32)
    inputs = make_inputs(100, heads=2, groups=1, batch=1)
    assert_matches_oracle(ssd, inputs, documents, torch.bfloat16)


def test_a_step_of_zero_leaves_the_state_as_it_is():
    inputs, _ = rounded(make_inputs(70, heads=2, groups=1), torch.float32)
    inputs["dt"][:] = 0.0
    assert torch.equal(ssd(**inputs).final, inputs["initial"])


def test_first_token_of_another_document_ignores_the_initial_state():
    inputs, _ = rounded(make_inputs(70, heads=2, groups=1, batch=1), torch.float32)
    documents = torch.full((1, 70), 3).int()
    without = ssd(**{**inputs, "initial": None}, documents=documents)
    inputs["initial"][:] = float("nan")
    with_state = ssd(**inputs, documents=documents)
    assert torch.equal(with_state.outputs, without.outputs)
    assert torch.equal(with_state.final, without.final)


@pytest.mark.parametrize("poisoning", [0, 1])
@pytest.mark.parametrize("border", [41, 64])
def test_nan_in_one_document_leaves_the_other_untouched(poisoning, border):
    documents = torch.tensor([[0] * border + [1] * (140 - border)]).int()
    clean, _ = rounded(make_inputs(140, heads=1, groups=1, batch=1), torch.float32)
    inside = documents[0] == poisoning
    dirty = {name: x.clone() for name, x in clean.items()}
    for name in ("values", "dt", "B", "C"):
        dirty[name][:, inside] = float("nan")
    if poisoning == 0:
        dirty["initial"][:] = float("nan")
    d_outputs, d_final = weights(clean, 140)
    spoilt_d_outputs = d_outputs.copy()
    spoilt_d_outputs[:, inside] = float("nan")
    expected, wanted = differentiate(ssd, clean, documents, d_outputs, d_final)
    result, gradients = differentiate(ssd, dirty, documents, spoilt_d_outputs, d_final)
    assert torch.equal(result.outputs[:, ~inside], expected.outputs[:, ~inside])
    assert result.outputs[:, inside].isnan().all()
    assert result.final.isnan().all() if poisoning else torch.equal(result.final, expected.final)
    assert all(x.isfinite().all() for x in gradients.values())
    for name in ("values", "dt", "B", "C") if poisoning == 0 else ():
        assert torch.equal(gradients[name][:, ~inside], wanted[name][:, ~inside])


@pytest.mark.parametrize("name", ["values", "dt", "B", "C"])
def test_an_infinity_spoils_its_document_from_its_token_on(name):
    documents = torch.tensor([[0] * 20 + [1] * 40]).int()
    inputs, _ = rounded(make_inputs(60, heads=2, groups=1, batch=1), torch.float32)
    wanted = ssd(**inputs, documents=documents).outputs
    inputs[name][0, 30].view(-1)[0] = float("inf")
    outputs = ssd(**inputs, documents=documents).outputs
    assert outputs[0, 30:].isnan().all()
    assert torch.equal(outputs[0, :30], wanted[0, :30])


def test_huge_steps_in_one_document_leave_the_other_untouched():
    documents = torch.tensor([[0] * 41 + [1] * 60]).int()
    inputs, _ = rounded(make_inputs(101, heads=2, groups=1, batch=1), torch.float32)
    loud = {name: x.clone() for name, x in inputs.items()}
    for name in ("values", "dt", "B", "C"):
        loud[name][:, :41] *= 1e5
    quiet, beside = (ssd(**x, documents=documents) for x in (inputs, loud))
    assert torch.equal(quiet.outputs[:, 41:], beside.outputs[:, 41:])
    assert torch.equal(quiet.final, beside.final)


def test_gradient_of_the_final_state_alone_reaches_the_inputs():
    inputs, exact = rounded(make_inputs(79, heads=2, groups=1, batch=1), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    ssd(**leaves).final.sum().backward()
    ones, documents = np.ones(exact["initial"].shape), make_documents(False, 1, 79)
    expected = oracle.gradients(exact, documents, np.zeros(exact["values"].shape), ones)
    for name in ("values", "dt", "A", "B", "initial"):
        assert_agrees(leaves[name].grad, expected[name], "gradients")
    assert not leaves["C"].grad.any()


def test_two_runs_are_equal_bit_for_bit():
    inputs, _ = rounded(make_inputs(130, heads=2, groups=1, batch=1), torch.float32)
    arguments = (inputs, torch.from_numpy(make_documents(True, 1, 130)), *weights(inputs, 130))
    (one, first), (two, second) = (differentiate(ssd, *arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in INPUTS)


def test_gradients_pass_through_to_strided_inputs():
    inputs, _ = rounded(make_inputs(40, heads=2, groups=1), torch.float32)
    documents = torch.zeros(2, 40).int()
    arguments = documents, *weights(inputs, 40)
    _, wanted = differentiate(ssd, inputs, *arguments)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.items()}
    _, gradients = differentiate(ssd, strided, *arguments)
    assert all(torch.equal(gradients[name], wanted[name]) for name in INPUTS)


def test_a_recorded_step_starts_eight_kernels():
    inputs, _ = rounded(make_inputs(130, heads=2, groups=1), torch.float32)
    leaves = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    with recording() as launches:
        result = ssd(**leaves)
        (result.outputs.sum() + result.final.sum()).backward()
    names = [launch.kernel.__name__ for launch in launches]
    walks = ["_decay_kernel", "_state_kernel"]
    assert names == [*walks, "_output_kernel", *walks, walks[1], "_head_kernel", "_shared_kernel"]
    assert all(x.grad.shape == x.shape for x in leaves.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_every_gradient_with_D_match_the_loop(dtype):
    assert_adds_the_values("ssd", ssd, 65, True, dtype, heads=2, groups=1)
