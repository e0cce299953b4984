"""The selective scan against float64 loops, in outputs, states and every gradient."""

import numpy as np
import pytest
import torch

from kernels.scans.selective_scan import selective_scan, selective_scan_reference
from tests.kernels.agreement import assert_agrees, needs_kernel, ragged_documents
from tests.oracles import selective_scan as oracle

LENGTHS = (1, 7, 8, 9, 63, 64, 65, 1000)
INPUTS = ("values", "dt", "A", "B", "C", "initial")


def make_inputs(length, channels=24, states=16, batch=2, dt=(0.001, 0.1), A=(-16.0, -0.05)):
    generator = np.random.default_rng(length * 1000 + channels)
    return {
        "values": generator.normal(size=(batch, length, channels)),
        "dt": np.exp(generator.uniform(*np.log(dt), size=(batch, length, channels))),
        "A": generator.uniform(*A, size=(channels, states)),
        "B": generator.normal(size=(batch, length, states)),
        "C": generator.normal(size=(batch, length, states)),
        "initial": generator.normal(size=(batch, channels, states)),
    }


def make_documents(ragged, batch, length):
    if not ragged:
        return np.zeros((batch, length), dtype=np.int32)
    return ragged_documents(batch, length, np.random.default_rng(length))


def rounded(inputs, dtype):
    """The inputs as tensors, and as float64 arrays of what the tensors hold."""
    tensors = {name: torch.tensor(x, dtype=dtype) for name, x in inputs.items()}
    return tensors, {name: x.double().numpy() for name, x in tensors.items()}


def weights(inputs, length):
    generator = np.random.default_rng(length + 1)
    d_outputs = generator.normal(size=inputs["values"].shape).astype(np.float32)
    d_final = generator.normal(size=inputs["initial"].shape).astype(np.float32)
    return d_outputs, d_final


def differentiate(scan, tensors, documents, d_outputs, d_final):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    result = scan(**leaves, documents=documents)
    weighted = (result.outputs * torch.as_tensor(d_outputs)).sum()
    weighted = weighted + (result.final * torch.as_tensor(d_final)).sum()
    return result, dict(zip(INPUTS, torch.autograd.grad(weighted, leaves.values()), strict=True))


def assert_matches_oracle(scan, inputs, documents, dtype):
    tensors, inputs = rounded(inputs, dtype)
    d_outputs, d_final = weights(inputs, documents.shape[1])
    outputs, states = oracle.scan(inputs, documents)
    expected = oracle.gradients(
        inputs, documents, d_outputs.astype(np.float64), d_final.astype(np.float64)
    )
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(scan, tensors, ids, d_outputs, d_final)
    assert_agrees(result.outputs, outputs, "outputs", dtype)
    assert_agrees(result.final, states[:, -1], "outputs", dtype)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_matches_the_loop_in_outputs_and_every_gradient(length, ragged):
    documents = make_documents(ragged, 2, length)
    assert_matches_oracle(selective_scan, make_inputs(length), documents, torch.float32)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 9, 65])
def test_reference_matches_the_loop_in_float64(length, ragged):
    documents = make_documents(ragged, 2, length)
    assert_matches_oracle(selective_scan_reference, make_inputs(length), documents, torch.float64)


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (5, 3), (16, 16), (100, 20), (130, 33)])
def test_any_number_of_channels_and_states_works(channels, states):
    documents = make_documents(True, 3, 20)
    inputs = make_inputs(20, channels, states, batch=3)
    assert_matches_oracle(selective_scan, inputs, documents, torch.float32)


@pytest.mark.parametrize(
    ("dt", "A"), [((0.001, 0.1), (-0.0501, -0.05)), ((0.1, 20.0), (-16.0, -15.0))]
)
def test_slow_and_strong_decay_match_the_loop(dt, A):
    inputs = make_inputs(1000, dt=dt, A=A)
    assert_matches_oracle(selective_scan, inputs, make_documents(False, 2, 1000), torch.float32)


def test_oracle_gradients_match_finite_differences():
    inputs = make_inputs(6, channels=2, states=3)
    documents = make_documents(True, 2, 6)
    d_outputs, d_final = (x.astype(np.float64) for x in weights(inputs, 6))

    def objective(changed):
        outputs, states = oracle.scan(changed, documents)
        return (outputs * d_outputs).sum() + (states[:, -1] * d_final).sum()

    expected = oracle.gradients(inputs, documents, d_outputs, d_final)
    generator = np.random.default_rng(0)
    for name in INPUTS:
        direction = generator.normal(size=inputs[name].shape)
        up, down = (
            objective({**inputs, name: inputs[name] + step * direction}) for step in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == pytest.approx((expected[name] * direction).sum(), rel=1e-6)


def test_exponential_is_accurate_to_rounding():
    exponents = torch.linspace(-80.0, 0.0, 100_000)
    channels = exponents.numel()
    scan = selective_scan(
        torch.zeros(1, 1, channels),
        -exponents.reshape(1, 1, channels),
        torch.full((channels, 1), -1.0),
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1),
        torch.ones(1, channels, 1),
    )
    exact = torch.exp(exponents.double())
    error = (scan.outputs.flatten().double() - exact).abs() / exact
    assert (error < 2e-7 + 1.3e-7 * exponents.abs()).all()


def test_a_step_of_zero_leaves_the_state_as_it_is():
    inputs, _ = rounded(make_inputs(20), torch.float32)
    inputs["dt"][:] = 0.0
    assert torch.equal(selective_scan(**inputs).final, inputs["initial"])


@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned):
    documents = torch.tensor([[0] * 21 + [1] * 20]).int()
    clean, _ = rounded(make_inputs(41, batch=1), torch.float32)
    inside = documents[0] == poisoned
    d_outputs, d_final = weights(clean, 41)
    if poisoned == 1:
        d_final = np.zeros_like(d_final)
    dirty = {name: x.clone() for name, x in clean.items()}
    for name in ("values", "dt", "B", "C"):
        dirty[name][:, inside] = float("nan")
    if poisoned == 0:
        dirty["initial"][:] = float("nan")
    expected, expected_gradients = differentiate(
        selective_scan, clean, documents, d_outputs, d_final
    )
    result, gradients = differentiate(selective_scan, dirty, documents, d_outputs, d_final)
    assert torch.equal(result.outputs[:, ~inside], expected.outputs[:, ~inside])
    for name in ("values", "dt", "B", "C"):
        assert torch.equal(gradients[name][:, ~inside], expected_gradients[name][:, ~inside])
    if poisoned == 0:
        assert torch.equal(result.final, expected.final)
    else:
        assert torch.equal(gradients["initial"], expected_gradients["initial"])


def test_first_token_of_another_document_ignores_the_initial_state():
    inputs, _ = rounded(make_inputs(5), torch.float32)
    documents = torch.full((2, 5), 3).int()
    without = {**inputs, "initial": None}
    assert torch.equal(
        selective_scan(**inputs, documents=documents).outputs,
        selective_scan(**without, documents=documents).outputs,
    )


def test_result_does_not_depend_on_the_number_of_threads():
    inputs, _ = rounded(make_inputs(65, channels=200, batch=3), torch.float32)
    documents = torch.from_numpy(make_documents(True, 3, 65))
    d_outputs, d_final = weights(inputs, 65)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(selective_scan, inputs, documents, d_outputs, d_final))
    finally:
        torch.set_num_threads(before)
    for result, gradients in runs[1:]:
        assert torch.equal(result.outputs, runs[0][0].outputs)
        assert torch.equal(result.final, runs[0][0].final)
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in INPUTS)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 31, 40])
def test_a_split_with_the_state_carried_equals_the_whole(cut, ragged):
    inputs, _ = rounded(make_inputs(41), torch.float32)
    documents = torch.from_numpy(make_documents(ragged, 2, 41))
    d_outputs, d_final = weights(inputs, 41)

    def in_two_pieces(values, dt, A, B, C, initial, documents):
        first = selective_scan(
            *(x[:, :cut] for x in (values, dt)),
            A,
            B[:, :cut],
            C[:, :cut],
            initial,
            documents[:, :cut],
        )
        second = selective_scan(
            *(x[:, cut:] for x in (values, dt)),
            A,
            B[:, cut:],
            C[:, cut:],
            first.final,
            documents[:, cut:] - documents[:, cut - 1 : cut],
        )
        return second._replace(outputs=torch.cat([first.outputs, second.outputs], dim=1))

    whole, expected = differentiate(selective_scan, inputs, documents, d_outputs, d_final)
    split, gradients = differentiate(in_two_pieces, inputs, documents, d_outputs, d_final)
    assert torch.equal(split.outputs, whole.outputs)
    assert torch.equal(split.final, whole.final)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients")


def test_bfloat16_inputs_give_float32_states_and_bfloat16_outputs():
    inputs, exact = rounded(make_inputs(65), torch.bfloat16)
    documents = make_documents(True, 2, 65)
    d_outputs, d_final = weights(exact, 65)
    outputs, states = oracle.scan(exact, documents)
    expected = oracle.gradients(
        exact, documents, d_outputs.astype(np.float64), d_final.astype(np.float64)
    )
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(selective_scan, inputs, ids, d_outputs, d_final)
    assert result.outputs.dtype is torch.bfloat16
    assert result.final.dtype is torch.float32
    assert_agrees(result.outputs, outputs, "outputs", torch.bfloat16)
    assert_agrees(result.final, states[:, -1], "outputs", torch.float32)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", torch.bfloat16)


def test_gradient_of_the_final_state_alone_reaches_the_inputs():
    inputs, exact = rounded(make_inputs(19), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    documents = make_documents(False, 2, 19)
    selective_scan(**leaves).final.sum().backward()
    ones = np.ones(exact["initial"].shape)
    expected = oracle.gradients(exact, documents, np.zeros(exact["values"].shape), ones)
    for name in ("values", "dt", "A", "B", "initial"):
        assert_agrees(leaves[name].grad, expected[name], "gradients")
    assert leaves["C"].grad is not None
    assert not leaves["C"].grad.any()


def test_inputs_may_be_slices_of_wider_tensors():
    inputs, _ = rounded(make_inputs(20), torch.float32)
    wide = torch.cat([inputs["B"], inputs["C"]], dim=-1)
    sliced = {**inputs, "B": wide[..., :16], "C": wide[..., 16:]}
    assert torch.equal(selective_scan(**sliced).outputs, selective_scan(**inputs).outputs)


def test_denormal_setting_of_the_caller_survives_a_call():
    inputs, _ = rounded(make_inputs(4), torch.float32)
    tiny = torch.full((1,), 1e-40)
    assert (tiny * 0.5).item() > 0
    selective_scan(**inputs)
    assert (tiny * 0.5).item() > 0


def test_meta_tensors_give_shapes_forward_and_backward():
    inputs, _ = rounded(make_inputs(70), torch.float32)
    leaves = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    result = selective_scan(**leaves)
    (result.outputs.sum() + result.final.sum()).backward()
    assert result.outputs.shape == (2, 70, 24)
    assert result.final.shape == (2, 24, 16)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves.values())


@needs_kernel
def test_operators_promise_the_shapes_that_they_return():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    arguments = (*inputs.values(), None)
    forward = torch.ops.crossladder.selective_scan_forward
    backward = torch.ops.crossladder.selective_scan_backward
    for chunk in (0, 4):
        torch.library.opcheck(forward, (*arguments, chunk), test_utils="test_faketensor")
    outputs, final, checkpoints = forward(*arguments, 4)
    arguments = (outputs, final, *arguments[:5], None, checkpoints, 4)
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


@needs_kernel
def test_cpu_calls_run_the_compiled_kernel():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    with torch.profiler.profile() as profile:
        selective_scan(**inputs)
    assert "crossladder::selective_scan_forward" in {event.key for event in profile.key_averages()}


def test_float64_goes_to_the_reference():
    inputs, _ = rounded(make_inputs(9), torch.float64)
    result, expected = selective_scan(**inputs), selective_scan_reference(**inputs)
    assert result.final.dtype is torch.float64
    assert torch.equal(result.outputs, expected.outputs)


def test_no_tokens_and_wrong_shapes_are_refused():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    empty = {
        name: x[:, :0] if name in ("values", "dt", "B", "C") else x for name, x in inputs.items()
    }
    with pytest.raises(ValueError, match="at least 1"):
        selective_scan(**empty)
    with pytest.raises((ValueError, TypeError)):
        selective_scan(**{**inputs, "B": inputs["B"][:, :-1]})
