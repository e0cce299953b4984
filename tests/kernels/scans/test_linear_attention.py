"""Causal linear attention against a float64 loop, and its gradients against finite differences."""

import numpy as np
import pytest
import torch

from kernels.scans.linear_attention import linear_attention, linear_attention_reference
from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.oracles import linear_attention as oracle

LENGTHS = (1, 7, 63, 64, 65, 200)


def make_inputs(length, width=5, features=7, batch=2, heads=2):
    generator = np.random.default_rng(length)
    return {
        "queries": generator.normal(size=(batch, length, heads, features)),
        "keys": generator.normal(size=(batch, length, heads, features)),
        "values": generator.normal(size=(batch, length, heads, width)),
        "initial": generator.normal(size=(batch, heads, features, width)),
    }


def make_documents(ragged, length):
    if not ragged:
        return np.zeros((2, length), dtype=np.int32)
    return ragged_documents(2, length, np.random.default_rng(length))


def tensors(inputs, dtype):
    return {name: torch.tensor(x, dtype=dtype) for name, x in inputs.items()}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outputs_and_state_match_the_loop(length, ragged, dtype):
    given, documents = tensors(make_inputs(length), dtype), make_documents(ragged, length)
    exact = {name: x.double().numpy() for name, x in given.items()}
    outputs, final = oracle.linear_attention(**exact, documents=documents)
    found = linear_attention(**given, documents=torch.from_numpy(documents))
    assert found.outputs.dtype is dtype
    assert found.final.dtype is torch.promote_types(dtype, torch.float32)
    assert_agrees(found.outputs, outputs, "outputs", dtype)
    assert_agrees(found.final, final, "outputs", found.final.dtype)


@pytest.mark.parametrize("ragged", [False, True])
def test_reference_matches_the_loop(ragged):
    given, documents = tensors(make_inputs(20), torch.float64), make_documents(ragged, 20)
    exact = {name: x.numpy() for name, x in given.items()}
    outputs, final = oracle.linear_attention(**exact, documents=documents)
    found = linear_attention_reference(**given, documents=torch.from_numpy(documents))
    assert_agrees(found.outputs, outputs, "outputs", torch.float64)
    assert_agrees(found.final, final, "outputs", torch.float64)


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_match_finite_differences(ragged):
    inputs = make_inputs(67, width=2, features=2, batch=2, heads=1)
    leaves = [x.requires_grad_() for x in tensors(inputs, torch.float64).values()]
    documents = torch.from_numpy(make_documents(ragged, 67))
    assert torch.autograd.gradcheck(
        lambda *given: tuple(linear_attention(*given, documents)), leaves, fast_mode=True
    )


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cut", [1, 63, 64, 99])
def test_a_split_with_the_state_carried_equals_the_whole(cut, ragged):
    given = tensors(make_inputs(100), torch.float64)
    documents = torch.from_numpy(make_documents(ragged, 100))
    whole, state = linear_attention(**given, documents=documents), given.pop("initial")
    pieces = []
    for begin, end in ((0, cut), (cut, 100)):
        ids = documents[:, begin:end] - (documents[:, begin - 1 : begin] if begin else 0)
        part = {name: x[:, begin:end] for name, x in given.items()}
        found = linear_attention(**part, initial=state, documents=ids)
        pieces.append(found.outputs)
        state = found.final
    assert_agrees(torch.cat(pieces, dim=1), whole.outputs, "outputs", torch.float64)
    assert_agrees(state, whole.final, "outputs", torch.float64)


def test_later_tokens_and_other_documents_enter_nothing_however_large():
    given = tensors({**make_inputs(100)}, torch.float32)
    documents = torch.tensor([[0] * 50 + [1] * 50] * 2).int()
    before = linear_attention(**given, documents=documents).outputs
    for place, kept in ((slice(70, None), slice(0, 70)), (slice(0, 50), slice(50, None))):
        loud = {name: x.clone() for name, x in given.items()}
        for name in ("queries", "keys", "values"):
            loud[name][:, place] *= 1e6
        after = linear_attention(**loud, documents=documents).outputs
        assert torch.equal(before[:, kept], after[:, kept])


def test_autocast_lowers_nothing():
    given = tensors(make_inputs(70), torch.float32)
    expected = linear_attention(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_attention(**given)
    assert torch.equal(found.outputs, expected.outputs)
    assert torch.equal(found.final, expected.final)


def test_no_tokens_and_wrong_shapes_are_refused():
    given = tensors(make_inputs(9), torch.float32)
    with pytest.raises((ValueError, TypeError)):
        linear_attention(**{**given, "queries": given["queries"][:, :-1]})
    with pytest.raises(ValueError, match="at least 1"):
        linear_attention(**{n: x if n == "initial" else x[:, :0] for n, x in given.items()})
