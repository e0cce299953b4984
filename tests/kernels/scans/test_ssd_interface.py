"""SSD's dtypes, memory, shapes on meta tensors, and what it refuses."""

import re
from pathlib import Path as File

import numpy as np
import pytest
import torch

from kernels.scans import ssd as module
from kernels.scans.ssd import ssd
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
from tests.oracles import ssd as oracle


def test_bfloat16_values_give_float32_states_and_bfloat16_outputs():
    inputs, exact = rounded(make_inputs(100), torch.bfloat16)
    documents = make_documents(True, 2, 100)
    outputs, states = oracle.scan(exact, documents)
    result = ssd(**inputs, documents=torch.from_numpy(documents))
    assert result.outputs.dtype is torch.bfloat16
    assert result.final.dtype is torch.float32
    assert_agrees(result.outputs, outputs, "outputs", torch.bfloat16)
    assert_agrees(result.final, states[:, -1], "outputs", torch.float32)
    assert_matches_oracle(ssd, make_inputs(100), documents, torch.bfloat16)


def test_autocast_changes_nothing():
    inputs, _ = rounded(make_inputs(100), torch.float32)
    documents = torch.from_numpy(make_documents(True, 2, 100))
    arguments = (inputs, documents, *weights(inputs, 100))
    plain, plain_gradients = differentiate(ssd, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        result, gradients = differentiate(ssd, *arguments)
    assert torch.equal(result.outputs, plain.outputs)
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in INPUTS)


def test_backward_keeps_nothing_but_its_inputs():
    inputs, _ = rounded(make_inputs(1000, groups=1), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    kept = []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ssd(**leaves)
    assert sum(kept) == sum(x.numel() for x in inputs.values())


def test_gradient_of_the_final_state_alone_reaches_the_inputs():
    inputs, exact = rounded(make_inputs(79), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    ssd(**leaves).final.sum().backward()
    ones, documents = np.ones(exact["initial"].shape), make_documents(False, 2, 79)
    expected = oracle.gradients(exact, documents, np.zeros(exact["values"].shape), ones)
    for name in ("values", "dt", "A", "B", "initial"):
        assert_agrees(leaves[name].grad, expected[name], "gradients")
    assert not leaves["C"].grad.any()


def test_the_compiled_kernels_have_the_same_chunks():
    header = File(module.__file__).with_name("ssd_chunks.h").read_text()
    assert re.findall(r"constexpr int64_t CHUNK = (\d+);", header) == [str(module.CHUNK)]


def test_meta_tensors_give_shapes_forward_and_backward():
    inputs, _ = rounded(make_inputs(70), torch.float32)
    leaves = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    result = ssd(**leaves)
    (result.outputs.sum() + result.final.sum()).backward()
    assert result.outputs.shape == (2, 70, 4, 5)
    assert result.final.shape == (2, 4, 5, 3)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves.values())


def test_no_tokens_and_wrong_shapes_are_refused():
    inputs, _ = rounded(make_inputs(9), torch.float32)
    sequences = ("values", "dt", "B", "C")
    empty = {name: x[:, :0] if name in sequences else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match="at least 1"):
        ssd(**empty)
    with pytest.raises(ValueError, match="divide"):
        ssd(**{**inputs, "B": inputs["B"][:, :, [0, 0, 0]], "C": inputs["C"][:, :, [0, 0, 0]]})
    with pytest.raises((ValueError, TypeError)):
        ssd(**{**inputs, "B": inputs["B"][:, :-1]})
