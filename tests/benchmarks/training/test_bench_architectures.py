"""The peers of the benchmark compute what ours does, and growth is held against the right bound."""

import pandas as pd
import pytest
import torch

from analysis.benchmarks.growth import exponents
from kernels.scans.selective_scan import selective_scan_reference
from tests.benchmarks.growth.bench_growth import LATE, _exponent_rows, bound
from tests.benchmarks.growth.growth_points import FIELDS, Point, take
from tests.benchmarks.kernels.parallel_scan import parallel_selective_scan


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


def points_of(times):
    """Points that grow as powers of the length, by mixer."""
    rows = [
        {"mixer": kind, "length": n, "seconds": 1e-9 * n**power, "bytes": n}
        for kind, power in times.items()
        for n in (1024, 4096, 16384, 65536)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("of_mlp", "of_mamba", "kept"),
    [(1.0, 1.09, True), (1.0, 1.11, False), (0.9, 1.09, True), (0.9, 1.11, False)],
)
def test_a_mixer_that_grows_faster_than_its_bound_is_told(of_mlp, of_mamba, kept):
    rows = list(_exponent_rows(points_of({"mlp": of_mlp, "mamba": of_mamba})))
    assert all(row.holds is not False for row in rows) is kept


def test_lengths_before_caches_end_have_no_late_line():
    points = points_of({"mlp": 1.0, "mamba": 1.0})
    rows = list(_exponent_rows(points[points["length"] < 16384]))
    assert rows
    assert not any(LATE in row.name for row in rows)


@pytest.mark.parametrize(("late", "kept"), [(1.3, False), (1.2, True)])
def test_from_where_caches_end_on_a_mixer_may_grow_as_an_mlp_does_beyond_its_bound(late, kept):
    points = points_of({"mlp": 1.15, "mamba": late})
    early = (points["mixer"] == "mamba") & (points["length"] == 1024)
    points.loc[early, "seconds"] *= 2.0
    rows = {row.name: row for row in _exponent_rows(points)}
    row = rows[f"mamba: exponent of time{LATE}"]
    assert row.bound == pytest.approx(1.1 + 0.15)
    assert row.value == pytest.approx(late)
    assert row.holds is kept
    assert rows["mamba: exponent of time"].bound == 1.1


@pytest.mark.parametrize("kind", FIELDS)
def test_every_mixer_of_the_growth_benchmark_can_be_measured(kind):
    answer = take(Point(kind, 128))
    assert not isinstance(answer, str), answer
