"""Inputs of SSD, and the comparison of a scan with its float64 loop."""

import numpy as np
import torch

from tests.kernels.agreement import assert_agrees, ragged_documents
from tests.oracles import ssd as oracle

INPUTS = oracle.NAMES


def make_inputs(length, heads=4, width=5, groups=2, states=3, batch=2, dt=(1e-3, 0.1), A=16.0):
    generator = np.random.default_rng(length * 1000 + heads)
    return {
        "values": generator.normal(size=(batch, length, heads, width)),
        "dt": np.exp(generator.uniform(*np.log(dt), size=(batch, length, heads))),
        "A": -generator.uniform(0.05, A, size=heads),
        "B": generator.normal(size=(batch, length, groups, states)),
        "C": generator.normal(size=(batch, length, groups, states)),
        "initial": generator.normal(size=(batch, heads, width, states)),
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
    tensors, exact = rounded(inputs, dtype)
    d_outputs, d_final = weights(exact, documents.shape[1])
    outputs, states = oracle.scan(exact, documents)
    wide = (x.astype(np.float64) for x in (d_outputs, d_final))
    expected = oracle.gradients(exact, documents, *wide)
    ids = torch.from_numpy(documents)
    result, gradients = differentiate(scan, tensors, ids, d_outputs, d_final)
    assert_agrees(result.outputs, outputs, "outputs", dtype)
    assert_agrees(result.final, states[:, -1], "outputs", result.final.dtype)
    for name in INPUTS:
        assert_agrees(gradients[name], expected[name], "gradients", dtype)
