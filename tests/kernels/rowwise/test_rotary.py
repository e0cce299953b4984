"""Turned pairs of channels against their operations one by one in float64."""

import pytest
import torch

from kernels.dispatch import Path, path_of
from kernels.rowwise import rotary as module
from kernels.rowwise.rotary import rotate_halves


def one_by_one(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def differentiate(function, x, cos, sin):
    leaf = x.clone().requires_grad_()
    turned = function(leaf, cos, sin)
    seed = torch.randn(turned.shape, generator=torch.Generator().manual_seed(9)).to(turned)
    return turned.detach(), *torch.autograd.grad(turned, leaf, seed)


def make(shape, rows=1, dtype=torch.float32):
    """Channels and the factors of their angles, which need not be of unit length."""
    generator = torch.Generator().manual_seed(0)
    angles = (rows, shape[1], 1, shape[3])
    return [torch.randn(size, generator=generator, dtype=dtype) for size in (shape, angles, angles)]


@pytest.mark.parametrize("path", [Path.NATIVE, Path.REFERENCE])
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "by_row"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 2), (2, 9, 3, 14), (2, 500, 8, 64), (2, 0, 3, 8)])
def test_turns_and_gradients_are_those_of_the_operations(monkeypatch, path, rows, shape):
    assert path_of(torch.ones(1)) is Path.NATIVE
    monkeypatch.setattr(module, "path_of", lambda _: path)
    inputs = make(shape, rows)
    found = differentiate(rotate_halves, *inputs)
    wanted = differentiate(one_by_one, *(x.double() for x in inputs))
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= 1e-6 * y.norm()


def test_channels_that_lie_apart_are_turned_alike():
    x, cos, sin = make((2, 9, 3, 14))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotate_halves(apart, cos, sin), rotate_halves(x, cos, sin))


def test_float64_stays_what_it_is():
    inputs = make((2, 9, 3, 14), dtype=torch.float64)
    found, wanted = differentiate(rotate_halves, *inputs), differentiate(one_by_one, *inputs)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype is torch.float64
        assert (x - y).norm() <= 1e-14 * y.norm()


def test_half_precision_is_computed_in_that_of_the_angles():
    x, cos, sin = make((1, 4, 1, 6))
    turned, gradient = differentiate(rotate_halves, x.bfloat16(), cos, sin)
    expected, _ = differentiate(one_by_one, x.bfloat16().float(), cos, sin)
    assert turned.dtype is torch.float32
    assert gradient.dtype is torch.bfloat16
    assert (turned - expected).norm() <= 1e-6 * expected.norm()


def test_a_nan_stays_in_its_pair():
    x, cos, sin = make((1, 2, 1, 8))
    x[0, 1, 0, 5] = torch.nan
    turned, _ = differentiate(rotate_halves, x, cos, sin)
    assert turned[0, 1, 0].isnan().nonzero().flatten().tolist() == [1, 5]
    assert not turned[0, 0].isnan().any()


def test_meta_tensors_give_shapes_forward_and_backward():
    x = torch.empty(2, 3, 4, 8, device="meta", requires_grad=True)
    cos = torch.empty(1, 3, 1, 8, device="meta")
    turned = rotate_halves(x, cos, cos)
    turned.sum().backward()
    assert turned.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
