"""The linear scan against float64 loops, in outputs, states and every gradient."""

import numpy as np
import pytest
import torch

from kernels.scans.linear_scan import linear_scan, linear_scan_reference
from tests.kernels.agreement import assert_agrees, needs_kernel, ragged_documents
from tests.oracles import linear_scan as oracle

INPUTS = oracle.NAMES
SLOW, ORDINARY, STRONG = (1e-5, 1e-3), (1e-3, 3.0), (20.0, 200.0)


def make_inputs(length, channels=24, batch=2, rates=ORDINARY):
    """Inputs whose decays forget at rates drawn log-uniformly from a range, per token."""
    generator = np.random.default_rng(length * 1000 + channels)
    shape = (batch, length, channels)
    return {
        "log_decay": -np.exp(generator.uniform(*np.log(rates), size=shape)),
        "values": generator.normal(size=shape),
        "initial": generator.normal(size=(batch, channels)),
    }


def make_documents(ragged, batch, length):
    if not ragged:
        return np.zeros((batch, length), dtype=np.int32)
    return ragged_documents(batch, length, np.random.default_rng(length))


def rounded(inputs, dtype=torch.float32, values_dtype=None):
    """The inputs as tensors, and as float64 arrays of what the tensors hold."""
    tensors = {name: torch.tensor(x, dtype=dtype) for name, x in inputs.items()}
    if values_dtype is not None:
        tensors["values"] = tensors["values"].to(values_dtype)
    return tensors, {name: x.double().numpy() for name, x in tensors.items()}


def weights(inputs):
    generator = np.random.default_rng(inputs["values"].shape[1] + 1)
    d_outputs = generator.normal(size=inputs["values"].shape).astype(np.float32)
    d_final = generator.normal(size=inputs["initial"].shape).astype(np.float32)
    return d_outputs, d_final


def differentiate(scan, tensors, documents, d_outputs, d_final):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    result = scan(**leaves, documents=documents)
    weighted = (result.outputs * torch.as_tensor(d_outputs)).sum()
    weighted = weighted + (result.final * torch.as_tensor(d_final)).sum()
    return result, dict(zip(INPUTS, torch.autograd.grad(weighted, leaves.values()), strict=True))


def assert_matches_oracle(scan, inputs, documents, dtype=torch.float32):
    tensors, inputs = rounded(inputs, dtype)
    d_outputs, d_final = weights(inputs)
    states = oracle.scan(inputs, documents)
    expected = oracle.gradients(
        inputs, documents, d_outputs.astype(np.float64), d_final.astype(np.float64)
    )
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(scan, tensors, ids, d_outputs, d_final)
    assert_agrees(result.outputs, states, "outputs", dtype)
    assert_agrees(result.final, states[:, -1], "outputs", dtype)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_kernel_matches_the_loop_in_outputs_and_every_gradient(length, ragged):
    assert_matches_oracle(linear_scan, make_inputs(length), make_documents(ragged, 2, length))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 9, 65])
def test_reference_matches_the_loop_in_float64(length, ragged):
    documents = make_documents(ragged, 2, length)
    assert_matches_oracle(linear_scan_reference, make_inputs(length), documents, torch.float64)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 48, 64, 65, 130])
def test_any_number_of_channels_works(channels):
    documents = make_documents(True, 3, 20)
    assert_matches_oracle(linear_scan, make_inputs(20, channels, batch=3), documents)


@pytest.mark.parametrize("rates", [SLOW, STRONG])
def test_slow_and_strong_decay_match_the_loop(rates):
    inputs = make_inputs(1000, rates=rates)
    assert_matches_oracle(linear_scan, inputs, make_documents(False, 2, 1000))


def test_rounding_does_not_grow_with_the_length():
    tensors, exact = rounded(make_inputs(16_384, channels=8, batch=1, rates=SLOW))
    states = oracle.scan(exact, make_documents(False, 1, 16_384))
    error = np.abs(linear_scan(**tensors).outputs.double().numpy() - states)
    assert error.max() < 3e-6 * np.abs(states).max()


def test_bfloat16_values_keep_their_precision_over_a_long_slow_decay():
    inputs = make_inputs(16_384, channels=8, batch=1, rates=SLOW)
    tensors, exact = rounded(inputs, values_dtype=torch.bfloat16)
    states = oracle.scan(exact, make_documents(False, 1, 16_384))
    result = linear_scan(**tensors)
    assert result.outputs.dtype is torch.bfloat16
    assert result.final.dtype is torch.float32
    assert_agrees(result.outputs, states, "outputs", torch.bfloat16)
    assert_agrees(result.final, states[:, -1], "outputs", torch.float32)


def test_decays_in_half_precision_are_refused():
    tensors, _ = rounded(make_inputs(9))
    with pytest.raises(ValueError, match=r"log_decay is torch\.bfloat16, .* compute it in float32"):
        linear_scan(**{**tensors, "log_decay": tensors["log_decay"].bfloat16()})


def test_oracle_gradients_match_finite_differences():
    inputs, documents = make_inputs(6, channels=3), make_documents(True, 2, 6)
    d_outputs, d_final = (x.astype(np.float64) for x in weights(inputs))

    def objective(changed):
        states = oracle.scan(changed, documents)
        return (states * d_outputs).sum() + (states[:, -1] * d_final).sum()

    expected = oracle.gradients(inputs, documents, d_outputs, d_final)
    generator = np.random.default_rng(0)
    for name in INPUTS:
        direction = generator.normal(size=inputs[name].shape)
        up, down = (
            objective({**inputs, name: inputs[name] + step * direction}) for step in (1e-5, -1e-5)
        )
        assert (up - down) / 2e-5 == pytest.approx((expected[name] * direction).sum(), rel=1e-6)


def test_a_decay_of_one_adds_up_the_values():
    tensors, _ = rounded(make_inputs(50))
    tensors["log_decay"][:] = 0.0
    tensors["values"] = tensors["values"].round()
    sums = tensors["initial"][:, None] * 0 + tensors["values"].cumsum(dim=1)
    del tensors["initial"]
    assert torch.equal(linear_scan(**tensors).outputs, sums)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_nan_in_one_document_leaves_the_other_untouched(poisoned):
    documents = torch.tensor([[0] * 21 + [1] * 20]).int()
    clean, _ = rounded(make_inputs(41, batch=1))
    inside = documents[0] == poisoned
    d_outputs, d_final = weights(clean)
    if poisoned == 1:
        d_final = np.zeros_like(d_final)
    dirty = {name: x.clone() for name, x in clean.items()}
    for name in ("log_decay", "values"):
        dirty[name][:, inside] = float("nan")
    if poisoned == 0:
        dirty["initial"][:] = float("nan")
    expected, expected_gradients = differentiate(linear_scan, clean, documents, d_outputs, d_final)
    result, gradients = differentiate(linear_scan, dirty, documents, d_outputs, d_final)
    assert torch.equal(result.outputs[:, ~inside], expected.outputs[:, ~inside])
    for name in ("log_decay", "values"):
        assert torch.equal(gradients[name][:, ~inside], expected_gradients[name][:, ~inside])
    if poisoned == 0:
        assert torch.equal(result.final, expected.final)
    else:
        assert torch.equal(gradients["initial"], expected_gradients["initial"])


def test_first_token_of_another_document_ignores_the_initial_state():
    tensors, _ = rounded(make_inputs(5))
    documents = torch.full((2, 5), 3).int()
    without = {**tensors, "initial": None}
    assert torch.equal(
        linear_scan(**tensors, documents=documents).outputs,
        linear_scan(**without, documents=documents).outputs,
    )


def test_result_does_not_depend_on_the_number_of_threads():
    tensors, _ = rounded(make_inputs(65, channels=200, batch=3))
    documents = torch.from_numpy(make_documents(True, 3, 65))
    d_outputs, d_final = weights(tensors)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(linear_scan, tensors, documents, d_outputs, d_final))
    finally:
        torch.set_num_threads(before)
    for result, gradients in runs[1:]:
        assert torch.equal(result.outputs, runs[0][0].outputs)
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in INPUTS)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 31, 40])
def test_a_split_with_the_state_carried_equals_the_whole(cut, ragged):
    tensors, _ = rounded(make_inputs(41))
    documents = torch.from_numpy(make_documents(ragged, 2, 41))
    d_outputs, d_final = weights(tensors)

    def in_two_pieces(log_decay, values, initial, documents):
        first = linear_scan(log_decay[:, :cut], values[:, :cut], initial, documents[:, :cut])
        continued = documents[:, cut:] - documents[:, cut - 1 : cut]
        second = linear_scan(log_decay[:, cut:], values[:, cut:], first.final, continued)
        return second._replace(outputs=torch.cat([first.outputs, second.outputs], dim=1))

    whole, expected = differentiate(linear_scan, tensors, documents, d_outputs, d_final)
    split, gradients = differentiate(in_two_pieces, tensors, documents, d_outputs, d_final)
    assert torch.equal(split.outputs, whole.outputs)
    assert torch.equal(split.final, whole.final)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients")


def test_gradient_of_the_final_state_alone_reaches_the_inputs():
    tensors, exact = rounded(make_inputs(19))
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    linear_scan(**leaves).final.sum().backward()
    zeros, ones = np.zeros(exact["values"].shape), np.ones(exact["initial"].shape)
    expected = oracle.gradients(exact, make_documents(False, 2, 19), zeros, ones)
    for name in INPUTS:
        assert_agrees(leaves[name].grad, expected[name], "gradients")


def test_the_final_state_does_not_hold_on_to_the_outputs():
    tensors, _ = rounded(make_inputs(50))
    for scan in (linear_scan, linear_scan_reference):
        final = scan(**tensors).final
        assert final.untyped_storage().nbytes() == final.numel() * 4


def test_inputs_may_be_slices_of_wider_tensors():
    tensors, _ = rounded(make_inputs(20))
    wide = torch.cat([tensors["log_decay"], tensors["values"]], dim=-1)
    sliced = {**tensors, "log_decay": wide[..., :24], "values": wide[..., 24:]}
    assert torch.equal(linear_scan(**sliced).outputs, linear_scan(**tensors).outputs)


def test_meta_tensors_give_shapes_forward_and_backward():
    tensors, _ = rounded(make_inputs(70))
    leaves = {name: x.to("meta").requires_grad_() for name, x in tensors.items()}
    result = linear_scan(**leaves)
    (result.outputs.sum() + result.final.sum()).backward()
    assert result.outputs.shape == (2, 70, 24)
    assert result.final.shape == (2, 24)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves.values())


@needs_kernel
def test_operators_promise_the_shapes_that_they_return():
    tensors, _ = rounded(make_inputs(9))
    forward = torch.ops.crossladder.linear_scan_forward
    backward = torch.ops.crossladder.linear_scan_backward
    for initial in (tensors["initial"], None):
        arguments = (tensors["log_decay"], tensors["values"], initial, None)
        torch.library.opcheck(forward, arguments, test_utils="test_faketensor")
        outputs = forward(*arguments)
        arguments = (outputs, tensors["log_decay"], outputs, initial, None)
        torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


@needs_kernel
def test_cpu_calls_run_the_compiled_kernel():
    tensors, _ = rounded(make_inputs(9))
    with torch.profiler.profile() as profile:
        linear_scan(**tensors)
    assert "crossladder::linear_scan_forward" in {event.key for event in profile.key_averages()}


def test_float64_goes_to_the_reference():
    tensors, _ = rounded(make_inputs(9), torch.float64)
    result, expected = linear_scan(**tensors), linear_scan_reference(**tensors)
    assert result.final.dtype is torch.float64
    assert torch.equal(result.outputs, expected.outputs)


def test_no_tokens_and_wrong_shapes_are_refused():
    tensors, _ = rounded(make_inputs(9))
    empty = {name: x[:, :0] if x.ndim == 3 else x for name, x in tensors.items()}
    with pytest.raises(ValueError, match="at least 1"):
        linear_scan(**empty)
    with pytest.raises((ValueError, TypeError)):
        linear_scan(**{**tensors, "initial": tensors["initial"][:, :-1]})
