"""The selective scan against torch.exp over the same number of elements, on the CPU.

The exponential is the floor: the scan needs one for each token, channel and state entry, in the
forward pass and again when the backward pass replays it. Run as a script or with pytest:

    python tests/benchmarks/kernels/bench_selective_scan.py
    python -m pytest -s tests/benchmarks/kernels/bench_selective_scan.py
"""

import sys

import pytest
import torch

from kernels.scans.selective_scan import selective_scan
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio

SIZES = {"tiny": (8, 256, 48, 16), "ragged": (8, 256, 24, 16), "large": (2, 1024, 512, 16)}


def make_contenders(size, scan=lambda *inputs: selective_scan(*inputs).outputs):
    """The three things to time, by name; the first is the floor."""
    batch, L, E, N = size
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(batch, L, E, generator=generator) for _ in range(2))
    dt = torch.rand(batch, L, E, generator=generator) * 0.1
    A = -1.0 - 15.0 * torch.rand(E, N, generator=generator)
    B, C = (torch.randn(batch, L, N, generator=generator) for _ in range(2))
    exponents = torch.randn(batch * L * E * N, generator=generator)
    powers = torch.empty_like(exponents)
    leaves = [x.clone().requires_grad_() for x in (values, dt, A, B, C)]
    return {
        "exp": lambda: torch.exp(exponents, out=powers),
        "forward": lambda: scan(values, dt, A, B, C),
        "both": lambda: torch.autograd.grad(scan(*leaves), leaves, gradient),
    }


def table():
    """One line for each size and number of threads."""
    yield f"median of {ROUNDS} interleaved rounds [quartiles]; ratios to torch.exp(out=)"
    yield f"{'size (B, L, E, N)':<26}{'threads':>8}{'exp ms':>9}{'forward':>22}{'and backward':>22}"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, size in SIZES.items():
                times = interleave(make_contenders(size))
                ratios = [f"{ratio(times[x], times['exp']):>22}" for x in ("forward", "both")]
                floor = f"{median(times['exp']):>9.3f}"
                yield f"{name + ' ' + str(size):<26}{threads:>8}{floor}{''.join(ratios)}"
    finally:
        torch.set_num_threads(before)


def write_table():
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_selective_scan_speed():
    write_table()


if __name__ == "__main__":
    write_table()
