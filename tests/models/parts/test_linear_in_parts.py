"""Gradients by hand are those of autograd through the same operations one by one."""

import pytest
import torch

from models.parts.linear_in_parts import linear_in_parts

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def apart(function, other, leaves):
    """The largest relative distance of outputs and gradients."""
    results = []
    for each in (function, other):
        outputs = each(*leaves)
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9))
        grads = torch.autograd.grad(outputs, leaves, weights.to(outputs))
        results.append((outputs.detach(), *grads))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_parts_of_a_map_are_those_of_the_whole(dtype, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(12, 5, generator=generator, dtype=dtype).requires_grad_()
    added = torch.randn(12, generator=generator, dtype=dtype).requires_grad_()
    leaves = (x, weight, added) if bias else (x, weight)

    def in_parts(x, weight, bias=None):
        parts = linear_in_parts(x, weight, bias, [7, 1, 4])
        assert all(part.is_contiguous() for part in parts)
        return torch.cat(parts, dim=-1)

    def at_once(x, weight, bias=0.0):
        return x @ weight.T + bias

    assert apart(in_parts, at_once, leaves) < TOLERANCE[dtype]


def test_a_part_that_nobody_reads_has_no_part_in_the_gradient():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    left, _ = linear_in_parts(x, weight, None, [2, 4])
    left.sum().backward()
    assert torch.equal(weight.grad[2:], torch.zeros(4, 4))
    torch.testing.assert_close(x.grad, weight[:2].sum(0).expand(3, 4))


def test_autocast_lowers_parts_of_a_map():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        parts = linear_in_parts(x, weight, None, [2, 4])
    assert {part.dtype for part in parts} == {torch.bfloat16}
