"""The linear scan against torch.exp over the same elements, and against its loop, on the CPU.

The exponential is the floor: the scan needs one for each token and channel, in the forward pass and
again in the backward pass. Run as a script or with pytest:

    python tests/benchmarks/kernels/bench_linear_scan.py
    python -m pytest -s tests/benchmarks/kernels/bench_linear_scan.py
"""

import sys

import pytest
import torch

from kernels.scans.linear_scan import linear_scan, linear_scan_reference
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio

SIZES = {"tiny": (8, 256, 48), "ragged": (8, 256, 40), "large": (4, 1024, 512)}
RATIOS = ("forward", "both", "loop", "loop, both")


def make_contenders(size):
    """The things to time, by name; the first is the floor."""
    generator = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(size, generator=generator)
    values, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    powers = torch.empty_like(log_decay)
    leaves = [x.clone().requires_grad_() for x in (log_decay, values)]

    def differentiate(scan):
        return torch.autograd.grad(scan(*leaves).outputs, leaves, gradient)

    return {
        "exp": lambda: torch.exp(log_decay, out=powers),
        "forward": lambda: linear_scan(log_decay, values),
        "both": lambda: differentiate(linear_scan),
        "loop": lambda: linear_scan_reference(log_decay, values),
        "loop, both": lambda: differentiate(linear_scan_reference),
    }


def table():
    """One line for each size and number of threads."""
    yield f"median of {ROUNDS} interleaved rounds [quartiles]; ratios to torch.exp(out=)"
    yield f"{'size (B, L, E)':<24}{'threads':>8}{'exp ms':>9}" + "".join(f"{x:>24}" for x in RATIOS)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, size in SIZES.items():
                times = interleave(make_contenders(size))
                ratios = [f"{ratio(times[x], times['exp']):>24}" for x in RATIOS]
                floor = f"{median(times['exp']):>9.3f}"
                yield f"{name + ' ' + str(size):<24}{threads:>8}{floor}{''.join(ratios)}"
    finally:
        torch.set_num_threads(before)


def write_table():
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_linear_scan_speed():
    write_table()


if __name__ == "__main__":
    write_table()
