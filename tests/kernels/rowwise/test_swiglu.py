"""The gate of a SwiGLU against its operations one by one in float64."""

import pytest
import torch

from kernels.dispatch import Path, path_of
from kernels.rowwise import swiglu as module
from kernels.rowwise.swiglu import silu_gated, swiglu


def one_by_one(joint):
    gate, up = joint.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def apart(joint):
    gate, up = joint.chunk(2, dim=-1)
    return silu_gated(up, gate)


def differentiate(function, joint):
    leaf = joint.clone().requires_grad_()
    gated = function(leaf)
    seed = torch.randn(gated.shape, generator=torch.Generator().manual_seed(9)).to(gated)
    return gated.detach(), *torch.autograd.grad(gated, leaf, seed)


def make(shape, dtype=torch.float32):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("path", [Path.NATIVE, Path.REFERENCE])
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 9, 14), (2, 500, 96), (4, 0, 6)])
@pytest.mark.parametrize("function", [swiglu, apart])
def test_gates_and_gradients_are_those_of_the_operations(monkeypatch, path, shape, function):
    assert path_of(torch.ones(1)) is Path.NATIVE
    monkeypatch.setattr(module, "path_of", lambda _: path)
    joint = make(shape)
    found, wanted = differentiate(function, joint), differentiate(one_by_one, joint.double())
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= 1e-6 * y.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("function", [swiglu, apart])
def test_other_dtypes_come_back_as_they_are(dtype, tolerance, function):
    joint = make((2, 9, 14), dtype)
    found, wanted = differentiate(function, joint), differentiate(one_by_one, joint.double())
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype is dtype
        assert (x - y).norm() <= tolerance * y.norm()


def test_extremes_are_what_they_tend_to_and_a_nan_stays_where_it_is():
    joint = torch.tensor([[-1e4, 1e4, torch.nan, 1.0, 2.0, 2.0, 2.0, 2.0]])
    gated, gradient = differentiate(swiglu, joint)
    open_gate = 2 / (1 + torch.exp(torch.tensor(-1.0)))
    assert gated[0, :2].tolist() == pytest.approx([0.0, 2e4])
    assert gated[0, 2].isnan()
    assert gated[0, 3] == pytest.approx(open_gate.item(), rel=1e-6)
    assert gradient[0].isnan().tolist() == [False, False, True, False, False, False, True, False]


def test_odd_channels_are_refused():
    with pytest.raises(ValueError, match="5 channels"):
        swiglu(torch.ones(2, 5))


def test_gates_for_other_numbers_are_refused():
    # Where shapes are checked by their annotations, those refuse first.
    with pytest.raises((ValueError, TypeError)):
        silu_gated(torch.ones(2, 6), torch.ones(2, 3))


def test_two_dtypes_give_the_wider():
    x, gate = make((2, 6)), make((2, 6)).bfloat16()
    assert silu_gated(x, gate).dtype is torch.float32
    torch.testing.assert_close(silu_gated(x, gate), x * torch.nn.functional.silu(gate.float()))


def test_meta_tensors_give_shapes_forward_and_backward():
    joint = torch.empty(2, 3, 8, device="meta", requires_grad=True)
    gated = swiglu(joint)
    gated.sum().backward()
    assert gated.shape == (2, 3, 4)
    assert joint.grad is not None
    assert joint.grad.shape == joint.shape
