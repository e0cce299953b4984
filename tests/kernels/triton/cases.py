"""Inputs, weights and comparisons that the tests of all Triton operators share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.triton_launch import interpreting
from tests.kernels.agreement import assert_agrees, ragged_documents

DEVICE = "cpu" if interpreting() or not torch.cuda.is_available() else "cuda"


def draw_documents(ragged, batch, length):
    if not ragged:
        return np.zeros((batch, length), dtype=np.int32)
    return ragged_documents(batch, length, np.random.default_rng(length))


@dataclass(frozen=True)
class Case:
    """An operator, tensors by name for it, and how what it returns is weighted.

    Attributes:
        weights: one array for each result of the operator; None leaves it out of the loss.
    """

    operator: Callable
    tensors: dict[str, torch.Tensor]
    documents: np.ndarray
    weights: tuple[np.ndarray | None, ...]

    def exact(self):
        """What the tensors hold, as float64 arrays."""
        return {name: x.detach().double().cpu().numpy() for name, x in self.tensors.items()}

    def run(self):
        """The results, and the gradients by name."""
        leaves = {name: x.to(DEVICE).requires_grad_() for name, x in self.tensors.items()}
        results = self.operator(**leaves, documents=torch.from_numpy(self.documents).to(DEVICE))
        loss = torch.zeros((), device=DEVICE)
        for result, weight in zip(results, self.weights, strict=True):
            if weight is not None:
                given = torch.as_tensor(weight, dtype=torch.float32, device=DEVICE)
                loss = loss + (result.float() * given).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        named = dict(zip(leaves, (x.cpu() for x in gradients), strict=True))
        return [x.detach().cpu() for x in results], named


def to_tensors(inputs, dtype=torch.float32, half=()):
    """The inputs in one dtype, and those named in `half` in bfloat16."""
    return {
        name: torch.tensor(x, dtype=torch.bfloat16 if name in half else dtype)
        for name, x in inputs.items()
    }


def assert_case_agrees(case, results, gradients, dtype=torch.float32):
    """Hold outputs, states and every gradient to the oracle's."""
    actual, actual_gradients = case.run()
    for got, expected in zip(actual, results, strict=True):
        if expected is not None:
            assert_agrees(got, expected, "outputs", dtype)
    for name, got in actual_gradients.items():
        assert_agrees(got, gradients[name], "gradients", dtype)


def assert_repeats(case):
    """Two runs agree bit by bit."""
    (results, gradients), (again, again_gradients) = case.run(), case.run()
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert all(torch.equal(gradients[name], again_gradients[name]) for name in gradients)


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)
