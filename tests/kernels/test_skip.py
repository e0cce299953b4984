"""D x beside a scan's outputs: gradients by hand against float64 by autograd."""

import pytest
import torch

from kernels.skip import add_skip
from tests.kernels.agreement import assert_agrees, needs_kernel


def make_leaves(length, heads=3, width=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, width), (heads,), (2, length, heads, width))
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return leaves, torch.randn(shapes[0], generator=generator)


def differentiate(function, leaves, d_outputs):
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    return outputs, torch.autograd.grad(outputs, leaves, d_outputs.to(outputs))


def by_heads(outputs, D, values):
    return outputs + torch.einsum("h,blhp->blhp", D, values)


@pytest.mark.parametrize("width", [1, 7, 32])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_outputs_and_gradients_match_float64(length, width):
    leaves, d_outputs = make_leaves(length, width=width)
    outputs, gradients = differentiate(add_skip, leaves, d_outputs)
    exact = [x.double() for x in leaves]
    expected, expected_gradients = differentiate(by_heads, exact, d_outputs)
    assert_agrees(outputs, expected.detach().numpy(), "outputs")
    for each, other in zip(gradients, expected_gradients, strict=True):
        assert_agrees(each, other.numpy(), "gradients")


def test_values_of_lower_precision_keep_it():
    (outputs, D, values), _ = make_leaves(9)
    mixed = add_skip(outputs, D, values.bfloat16())
    assert mixed.dtype is torch.bfloat16


@needs_kernel
def test_result_does_not_depend_on_the_number_of_threads():
    leaves, d_outputs = make_leaves(1000)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(differentiate(add_skip, leaves, d_outputs)[1])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_kernel
def test_operator_promises_the_shapes_that_it_returns():
    arguments = (torch.randn(9, 4), torch.randn(9, 4), torch.randn(4))
    torch.library.opcheck(
        torch.ops.crossladder.skip_backward, arguments, test_utils="test_faketensor"
    )
