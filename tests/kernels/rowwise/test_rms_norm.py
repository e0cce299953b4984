"""Norms by one pass over memory are those of their operations, in outputs and every gradient."""

import pytest
import torch

from kernels.rowwise.rms_norm import rms_norm, rms_norm_reference, rotated_rms_norm
from tests.kernels.agreement import assert_agrees, needs_kernel
from tests.kernels.rowwise.test_rotary import one_by_one as turned_one_by_one

# Only eps keeps the gradient of a group of one channel from zero: less would leave its rounding.
EPS = 1e-2
NAMES = ("outputs", "x", "weight", "gate")
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def one_by_one(x, weight, eps, groups=1, gate=None):
    z = x if gate is None else x * gate * torch.sigmoid(gate)
    grouped = z.unflatten(-1, (groups, -1))
    normed = grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return weight * normed.flatten(-2)


def drawn(rows, channels, gated, dtype=torch.float32):
    """Inputs, weight, gates where there are any, and gradients of the outputs."""
    generator = torch.Generator().manual_seed(rows * 10007 + channels)
    shapes = [(rows, channels), (channels,), *[(rows, channels)] * gated]
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return leaves, torch.randn(rows, channels, generator=generator).to(dtype)


def results(norm, leaves, groups, d_outputs):
    """Outputs and gradients by name."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = norm(*leaves[:2], EPS, groups, *leaves[2:])
    found = (outputs, *torch.autograd.grad(outputs, leaves, d_outputs))
    return dict(zip(NAMES, found, strict=False))


def assert_is_that_of_its_operations(norm, leaves, groups, d_outputs):
    dtype = leaves[0].dtype
    found = results(norm, leaves, groups, d_outputs)
    expected = results(one_by_one, [x.double() for x in leaves], groups, d_outputs.double())
    for name, tensor in expected.items():
        kind = "outputs" if name == "outputs" else "gradients"
        assert found[name].dtype is dtype
        assert_agrees(found[name], tensor, kind, dtype)


def sizes():
    widths = {1: (1, 5, 16, 64, 1000), 3: (3, 15, 48, 192), 8: (8, 40, 128, 1000)}
    return [(width, groups) for groups, each in widths.items() for width in each]


@GATED
@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize(("channels", "groups"), sizes())
def test_the_norm_is_that_of_its_operations(channels, groups, rows, gated):
    leaves, d_outputs = drawn(rows, channels, gated)
    assert_is_that_of_its_operations(rms_norm, leaves, groups, d_outputs)


@GATED
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_returned_and_no_less_exact(dtype, groups, gated):
    leaves, d_outputs = drawn(50, 48, gated, dtype)
    assert_is_that_of_its_operations(rms_norm, leaves, groups, d_outputs)


@GATED
def test_the_reference_is_that_of_its_operations(gated):
    leaves, d_outputs = drawn(50, 48, gated)
    assert_is_that_of_its_operations(rms_norm_reference, leaves, 3, d_outputs)


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=["whole", "some heads"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2)], ids=["side by side", "apart"])
def test_rows_may_be_views(part, order):
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 50, 12, 12, generator=generator).permute(order)[:, :, part]
    leaves = (heads, torch.rand(12, generator=generator))
    d_outputs = torch.randn(heads.shape, generator=generator).permute(0, 2, 1, 3).contiguous()
    assert_is_that_of_its_operations(rms_norm, leaves, 1, d_outputs.permute(0, 2, 1, 3))


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_wider_matrix_and_one_gradient_for_all_are_read_where_they_lie(groups):
    joint = torch.randn(30, 3 * 20, generator=torch.Generator().manual_seed(0))
    x, gate, _ = joint.split(20, dim=-1)
    leaves, d_outputs = (x, torch.rand(20), gate), torch.tensor(0.5).expand(30, 20)
    assert_is_that_of_its_operations(rms_norm, leaves, groups, d_outputs)


@GATED
def test_the_norm_of_zeros_and_its_gradients_are_finite(gated):
    leaves = [torch.zeros(3, 4), torch.ones(4), *[torch.zeros(3, 4)] * gated]
    found = results(rms_norm, leaves, 2, torch.ones(3, 4))
    assert torch.equal(found["outputs"], torch.zeros(3, 4))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_gradients_of_very_small_and_very_large_inputs_are_no_less_exact(size):
    (x, weight), d_outputs = drawn(9, 48, False)
    assert_is_that_of_its_operations(rms_norm, (x * size, weight), 1, d_outputs)


def test_gates_that_are_all_but_shut_or_open_have_finite_gradients():
    (x, weight, _), d_outputs = drawn(2, 48, True)
    gate = torch.linspace(-200, 200, 96).view(2, 48)
    assert_is_that_of_its_operations(rms_norm, (x, weight, gate), 1, d_outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "gated"), [("x", False), ("x", True), ("gate", True)])
def test_what_is_not_finite_stays_in_its_row_and_group(name, value, gated):
    clean, d_outputs = drawn(20, 34, gated)
    dirty = [leaf.clone() for leaf in clean]
    dirty[0 if name == "x" else 2][7, 20] = value
    expected = results(rms_norm, clean, 2, d_outputs)
    found = results(rms_norm, dirty, 2, d_outputs)
    apart = torch.ones(20, 34, dtype=torch.bool)
    apart[7, 17:] = False
    for each in ("outputs", "x", "gate")[: 2 + gated]:
        assert torch.equal(found[each][apart], expected[each][apart])
    assert torch.isnan(found["outputs"][7, 20])
    assert torch.equal(found["weight"][:17], expected["weight"][:17])


@GATED
@pytest.mark.parametrize(("rows", "channels", "groups"), [(1000, 100, 4), (5000, 3, 1)])
def test_results_do_not_depend_on_the_number_of_threads(rows, channels, groups, gated):
    leaves, d_outputs = drawn(rows, channels, gated)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(results(rms_norm, leaves, groups, d_outputs))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], tensor) for name, tensor in runs[0].items())


def test_one_row_alone_is_what_it_is_among_many():
    (x, weight, gate), _ = drawn(1000, 48, True)
    together = rms_norm(x, weight, EPS, 3, gate)
    for row in (0, 500, 999):
        assert torch.equal(rms_norm(x[row], weight, EPS, 3, gate[row]), together[row])


@GATED
def test_no_rows_have_a_norm_and_gradients_of_zero(gated):
    leaves, d_outputs = drawn(0, 6, gated)
    found = results(rms_norm, leaves, 2, d_outputs)
    assert found["outputs"].shape == (0, 6)
    assert torch.equal(found["weight"], torch.zeros(6))


@GATED
def test_meta_tensors_give_shapes_forward_and_backward(gated):
    leaves, d_outputs = drawn(30, 48, gated)
    found = results(rms_norm, [x.to("meta") for x in leaves], 3, d_outputs.to("meta"))
    shapes = {name: tensor.shape for name, tensor in found.items()}
    assert shapes == {n: t.shape for n, t in results(rms_norm, leaves, 3, d_outputs).items()}
    assert all(tensor.is_meta for tensor in found.values())


@needs_kernel
@GATED
def test_operators_promise_the_shapes_that_they_return(gated):
    (x, weight, *gates), d_outputs = drawn(30, 48, gated)
    gate = gates[0] if gated else None
    forward = torch.ops.crossladder.rms_norm_forward
    backward = torch.ops.crossladder.rms_norm_backward
    _, scale = forward(x, gate, weight, 3, EPS)
    for operator, arguments in (
        (forward, (x, gate, weight, 3, EPS)),
        (backward, (d_outputs, x, gate, weight, scale)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_shapes_that_do_not_fit_are_refused():
    (x, weight, gate), _ = drawn(4, 12, True)
    with pytest.raises(ValueError, match="5 groups do not divide"):
        rms_norm(x, weight, EPS, 5)
    with pytest.raises((ValueError, TypeError)):
        rms_norm(x, weight[:-1], EPS)
    with pytest.raises((ValueError, TypeError)):
        rms_norm(x, weight, EPS, 1, gate[:-1])


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "by_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 1, 2), (2, 9, 3, 14), (2, 300, 8, 64)])
def test_a_turned_norm_is_the_turn_of_a_norm(shape, rows, dtype):
    generator = torch.Generator().manual_seed(0)
    angles = (rows, shape[1], 1, shape[3])
    sizes = (shape, shape[3:], shape, angles, angles)
    x, weight, d_turned, cos, sin = (torch.randn(s, generator=generator).to(dtype) for s in sizes)

    def apart(x, weight, eps, cos, sin):
        return turned_one_by_one(one_by_one(x, weight, eps), cos, sin)

    found, expected = (
        turned_results(norm, x.to(kind), weight.to(kind), d_turned.to(kind), cos, sin)
        for norm, kind in ((rotated_rms_norm, dtype), (apart, torch.float64))
    )
    for name, tensor in expected.items():
        assert found[name].dtype is dtype
        assert_agrees(found[name], tensor, "outputs" if name == "outputs" else "gradients", dtype)


def turned_results(norm, x, weight, d_turned, cos, sin):
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight)]
    turned = norm(*leaves, EPS, cos.to(x.dtype), sin.to(x.dtype))
    found = (turned, *torch.autograd.grad(turned, leaves, d_turned))
    return dict(zip(NAMES, found, strict=False))
