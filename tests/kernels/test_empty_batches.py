"""Operators on no rows: no outputs, and gradients of zero for what rows share."""

import pytest
import torch

from kernels.convolution.causal_conv import causal_conv
from kernels.convolution.long_conv import long_conv
from kernels.convolution.silu_conv import silu_conv
from kernels.rowwise.rms_norm import rms_norm
from kernels.scans.bidirectional_ssd import bidirectional_ssd
from kernels.scans.linear_scan import linear_scan
from kernels.scans.rglru import rglru
from kernels.scans.selective_scan import selective_scan
from kernels.scans.ssd import ssd

L = 18
OPERATORS = {
    "selective_scan": (
        lambda x, dt, A, B, C: selective_scan(x, dt, A, B, C),
        [(0, L, 3), (0, L, 3), (3, 2), (0, L, 2), (0, L, 2)],
    ),
    "ssd": (
        lambda x, dt, A, B, C: ssd(x, dt, A, B, C),
        [(0, L, 2, 3), (0, L, 2), (2,), (0, L, 1, 2), (0, L, 1, 2)],
    ),
    "bidirectional_ssd": (
        lambda x, dt, A, B, C: (bidirectional_ssd(x, dt, A, B, C),),
        [(0, L, 2, 3), (0, L, 2, 2), (2,), (0, L, 2, 1, 2), (0, L, 2, 1, 2)],
    ),
    "linear_scan": (lambda a, x: linear_scan(a, x), [(0, L, 3), (0, L, 3)]),
    "rglru": (
        lambda r, i, rate: rglru(r, i, rate, torch.zeros(0, L, dtype=torch.bool)),
        [(0, L, 3), (0, L, 3), (3,)],
    ),
    "rglru of no tokens": (
        lambda r, i, rate: rglru(r, i, rate, torch.zeros(2, 0, dtype=torch.bool)),
        [(2, 0, 3), (2, 0, 3), (3,)],
    ),
    "causal_conv": (lambda x, w, b: causal_conv(x, w, b), [(0, L, 3), (3, 4), (3,)]),
    "silu_conv": (lambda x, w, b: silu_conv(x, w, b, [1, 2]), [(0, L, 3), (3, 4), (3,)]),
    "long_conv": (lambda x, w: (long_conv(x, w),), [(0, L, 3), (3, 7)]),
    "long_conv by FFT": (lambda x, w: (long_conv(x, w),), [(0, 90, 3), (3, 7)]),
    "rms_norm": (lambda x, w: (rms_norm(x, w, 1e-5),), [(0, L, 6), (6,)]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_no_rows_are_zero(name):
    operator, shapes = OPERATORS[name]
    leaves = [torch.ones(shape, requires_grad=True) for shape in shapes]
    outputs = operator(*leaves)
    found = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


def test_a_rate_in_half_precision_is_computed_with_in_float32():
    generator = torch.Generator().manual_seed(0)
    gates = [torch.randn(2, L, 3, generator=generator) for _ in range(2)]
    begins = torch.zeros(2, L, dtype=torch.bool)
    rate = torch.tensor([0.5, 1.0, 2.0])
    expected = rglru(*gates, rate, begins)
    for dtype in (torch.bfloat16, torch.float16):
        half = rate.to(dtype).requires_grad_()
        steps = rglru(*gates, half, begins)
        for one, other in zip(steps, expected, strict=True):
            assert torch.equal(one, other)
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in steps), half)
        assert gradient.dtype is dtype
