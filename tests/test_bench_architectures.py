"""The peers of the benchmark compute what ours does, and growth is held against the right bound."""

import pandas as pd
import pytest
import torch

from analysis.growth_figure import exponents
from kernels.selective_scan import selective_scan_reference
from tests.bench_growth import bound
from tests.growth_points import FIELDS, Point, take
from tests.kernels.parallel_scan import parallel_selective_scan


@pytest.mark.parametrize("length", [1, 5, 64, 100])
def test_the_parallel_scan_is_the_selective_scan(length):
    generator = torch.Generator().manual_seed(length)
    values, B, C = (torch.randn(2, length, n, generator=generator) for n in (6, 4, 4))
    dt, A = torch.rand(2, length, 6, generator=generator), -torch.rand(6, 4, generator=generator)
    leaves = [x.double().requires_grad_() for x in (values, dt, A, B, C)]
    ours = selective_scan_reference(*leaves).outputs
    theirs = parallel_selective_scan(*leaves)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, generator=generator).double()
    pairs = zip(*(torch.autograd.grad(y, leaves, weights) for y in (ours, theirs)), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in pairs)


def test_the_exponent_of_a_power_law_is_found():
    lengths = [4096, 8192, 16384]
    rows = {"mixer": "a", "length": lengths, "seconds": [3e-9 * n**1.5 for n in lengths]}
    found = exponents(pd.DataFrame({**rows, "bytes": lengths}))
    assert found["seconds"].iloc[0] == pytest.approx(1.5)
    assert found["bytes_error"].iloc[0] == pytest.approx(0.0, abs=1e-9)


def test_checkpoints_at_a_tenth_of_the_tokens_are_bounded_between_linear_and_quadratic():
    assert 1.1 < bound("scout", [4096, 65536]) < 2.0


@pytest.mark.parametrize("kind", FIELDS)
def test_every_mixer_of_the_growth_benchmark_can_be_measured(kind):
    answer = take(Point(kind, 128))
    assert not isinstance(answer, str), answer
