"""No operator gives wrong second derivatives: kernels refuse them, plain torch has them right."""

import importlib
import pkgutil

import pytest
import torch
from torch.autograd import gradgradcheck

import kernels
import models
from kernels.attention import checkpoint_attention as checkpoints
from kernels.attention.block_sparse_attention import (
    BlockSparsity,
    block_sparse_attention,
    query_blocks,
)
from kernels.attention.packed_attention import packed_attention
from kernels.attention.slot_attention import slot_log_sums
from kernels.attention.window_attention import centred_window_attention, window_attention
from kernels.convolution.causal_conv import causal_conv
from kernels.convolution.long_conv import long_conv
from kernels.convolution.silu_conv import silu_conv
from kernels.derivatives import plain_torch
from kernels.rowwise.rms_norm import rms_norm, rotated_rms_norm
from kernels.rowwise.rotary import rotate_halves
from kernels.rowwise.swiglu import silu_gated, swiglu
from kernels.scans.bidirectional_ssd import bidirectional_ssd
from kernels.scans.linear_attention import linear_attention
from kernels.scans.linear_scan import linear_scan
from kernels.scans.rglru import _BoundedSqrt, rglru
from kernels.scans.selective_scan import selective_scan
from kernels.scans.ssd import ssd
from models.parts.linear_in_parts import linear_in_parts

L = 18
"""Tokens: more than the few that `window_attention` treats by themselves."""
IDS = torch.tensor([0] * 5 + [1] * 2 + [2] * (L - 7)).expand(2, L)
ANGLES = torch.linspace(0, 3, L * 4).view(1, L, 1, 4)
POSITIONS = torch.arange(L).expand(2, L)


def steps(x):
    return torch.nn.functional.softplus(x)


# The operator, then the shapes of what is differentiated.
OPERATORS = {
    "selective_scan": (
        lambda x, dt, A, B, C, h, D: selective_scan(x, steps(dt), -A.exp(), B, C, h, IDS, D),
        [(2, L, 3), (2, L, 3), (3, 2), (2, L, 2), (2, L, 2), (2, 3, 2), (3,)],
    ),
    "ssd": (
        lambda x, dt, A, B, C, h, D: ssd(x, steps(dt), -A.exp(), B, C, h, IDS, D),
        [(2, L, 2, 3), (2, L, 2), (2,), (2, L, 1, 2), (2, L, 1, 2), (2, 2, 3, 2), (2,)],
    ),
    "bidirectional_ssd": (
        lambda x, dt, A, B, C: bidirectional_ssd(x, steps(dt), -A.exp(), B, C, IDS),
        [(2, L, 2, 3), (2, L, 2, 2), (2,), (2, L, 2, 1, 2), (2, L, 2, 1, 2)],
    ),
    "linear_scan": (
        lambda a, x, h: linear_scan(-steps(a), x, h, IDS),
        [(2, L, 3), (2, L, 3), (2, 3)],
    ),
    "linear_attention": (
        lambda q, k, v, h: linear_attention(q, k, v, h, IDS),
        [(2, L, 2, 3), (2, L, 2, 3), (2, L, 2, 2), (2, 2, 3, 2)],
    ),
    "slot_log_sums": (lambda a, h: (slot_log_sums(a, h, IDS),), [(2, L, 2, 3), (2, 2, 3)]),
    "rglru": (
        lambda r, i, rate, c: rglru(r, i, steps(rate), IDS == 1, c),
        [(2, L, 3), (2, L, 3), (3,), (2, L, 3)],
    ),
    "causal_conv": (
        lambda x, w, b, h: causal_conv(x, w, b, h, IDS),
        [(2, L, 3), (3, 4), (3,), (2, 3, 3)],
    ),
    "silu_conv": (
        lambda x, w, b, h: silu_conv(x, w, b, [1, 2], h, IDS),
        [(2, L, 3), (3, 4), (3,), (2, 3, 3)],
    ),
    "long_conv": (
        lambda x, w, r: (long_conv(x, w, IDS, r),),
        [(2, L, 3), (3, 7), (3, 5)],
    ),
    "long_conv of long rows": (
        lambda x, w: (long_conv(x.repeat(1, 5, 1), w),),
        [(1, L, 2), (2, 9)],
    ),
    "window_attention": (
        lambda q, k, v: (window_attention(q, k, v, 5, IDS),),
        [(2, L, 4, 2), (2, L, 2, 2), (2, L, 2, 3)],
    ),
    "centred_window_attention": (
        lambda q, k, v: (centred_window_attention(q, k, v, 5, IDS),),
        [(2, L, 4, 2), (2, L, 2, 2), (2, L, 2, 3)],
    ),
    "packed_attention": (
        lambda q, k, v: (packed_attention(q, k, v, IDS, causal=True),),
        [(2, L, 4, 2), (2, L, 2, 2), (2, L, 2, 3)],
    ),
    "checkpoint_attention": (
        lambda q, k, v, ck, cv: (
            checkpoints.checkpoint_attention(q, k, v, ck, cv, checkpoints.Segments(4, 0)),
        ),
        [(2, L, 4, 2), (2, L, 2, 2), (2, L, 2, 3), (2, L // 4, 2, 2), (2, L // 4, 2, 3)],
    ),
    "block_sparse_attention": (
        lambda q, k, v: (
            block_sparse_attention(
                *(q, k, v, torch.zeros(2, 4, 5, 1, dtype=torch.int64)),
                query_blocks(POSITIONS, L, 4, 4),
                BlockSparsity(4, 1, 3),
            ),
        ),
        [(2, L, 4, 2), (2, L, 2, 2), (2, L, 2, 3)],
    ),
    "swiglu": (lambda x: (swiglu(x),), [(2, L, 6)]),
    "silu_gated": (lambda x, g: (silu_gated(x, g),), [(2, L, 3), (2, L, 3)]),
    "rms_norm": (
        lambda x, w, g: (rms_norm(x, w, 1e-3, 2, g),),
        [(2, L, 6), (6,), (2, L, 6)],
    ),
    "rotated_rms_norm": (
        lambda x, w: (
            rotated_rms_norm(x, w, 1e-3, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),
        ),
        [(2, L, 2, 4), (4,)],
    ),
    "rotate_halves": (
        lambda x: (rotate_halves(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),),
        [(2, L, 2, 4)],
    ),
    "linear_in_parts": (
        lambda x, w, b: linear_in_parts(x, w, b, [2, 3]),
        [(2, L, 4), (5, 4), (5,)],
    ),
}
PLAIN = {"linear_attention", "slot_log_sums"}
"""Operators without a kernel, which can always be differentiated twice."""


def inputs(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in drawn]


def total(outputs):
    # Linear in the outputs: their gradient itself needs none, so only what the operator saved does.
    return sum(x.sum() for x in outputs)


def functions():
    """Every autograd function of the kernels and models."""
    for package in (kernels, models):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("_triton"):
                importlib.import_module(module.name)
    found = torch.autograd.Function.__subclasses__()
    return [f for f in found if f.__module__.startswith(("kernels.", "models."))]


def test_every_backward_pass_without_a_graph_of_its_own_refuses_to_make_one():
    refusing = [f for f in functions() if f is not _BoundedSqrt]
    assert len(refusing) > 15
    for function in refusing:
        with pytest.raises(RuntimeError, match=r"create_graph=True .*plain_torch"):
            function.backward(None)


@pytest.mark.parametrize("name", OPERATORS.keys() - PLAIN)
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_a_kernel_refuses_second_derivatives_by_name(name, way):
    operator, shapes = OPERATORS[name]
    leaves = inputs(shapes, torch.float32)
    loss = total(operator(*leaves))

    def ask():
        if way == "grad":
            torch.autograd.grad(loss, leaves, create_graph=True)
        else:
            loss.backward(create_graph=True)

    expected = r"create_graph=True asks for a gradient of .*plain_torch"
    with pytest.raises(RuntimeError, match=expected):
        ask()


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_in_plain_torch_are_differences_of_gradients(name):
    operator, shapes = OPERATORS[name]
    leaves = inputs(shapes, torch.float64)
    with plain_torch():
        assert gradgradcheck(operator, leaves, fast_mode=True)


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_torch_and_kernels_agree(name):
    operator, shapes = OPERATORS[name]
    leaves = inputs(shapes, torch.float32)
    by_kernels = operator(*leaves)
    with plain_torch():
        plain = operator(*leaves)
    for one, other in zip(by_kernels, plain, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    first = torch.autograd.grad(total(by_kernels), leaves)
    second = torch.autograd.grad(total(plain), leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_bounded_root_of_an_rglru_has_the_derivative_of_its_bounded_gradient():
    x = torch.tensor([0.3, 0.02, 1e-9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_BoundedSqrt.apply(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    expected = -0.25 * x.detach() ** -1.5
    expected[2] = 0.0
    torch.testing.assert_close(second, expected)


def test_plain_torch_ends_with_its_block_even_by_an_error():
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(ZeroDivisionError), plain_torch():
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="swiglu"):
        torch.autograd.grad(swiglu(x).sum(), x, create_graph=True)
