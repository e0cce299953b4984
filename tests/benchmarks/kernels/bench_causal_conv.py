"""The causal convolution against its plain torch reference and torch's conv1d, on the CPU.

python tests/benchmarks/kernels/bench_causal_conv.py
python -m pytest -s tests/benchmarks/kernels/bench_causal_conv.py
"""

import sys

import pytest
import torch
from torch.nn import functional

from kernels.convolution.causal_conv import causal_conv, causal_conv_reference
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio

SIZES = {"tiny": (8, 256, 48, 4), "large": (2, 1024, 512, 4), "wide taps": (2, 1024, 512, 7)}


def torch_conv(values, weight, bias):
    E, K = weight.shape
    channels_first = values.transpose(1, 2)
    outputs = functional.conv1d(channels_first, weight[:, None], bias, padding=K - 1, groups=E)
    return outputs[..., : values.shape[1]].transpose(1, 2)


def make_contenders(size):
    """Forward and backward of three implementations; the first is the kernel."""
    batch, L, E, K = size
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, L, E), (E, K), (E,))
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    gradient = torch.randn(batch, L, E, generator=generator)

    def both(convolve):
        return lambda: torch.autograd.grad(convolve(*leaves), leaves, gradient)

    return {
        "kernel": both(lambda *x: causal_conv(*x).outputs),
        "reference": both(lambda *x: causal_conv_reference(*x).outputs),
        "conv1d": both(torch_conv),
    }


def table():
    """One line for each size and number of threads."""
    yield f"forward and backward, median of {ROUNDS} interleaved rounds [quartiles]"
    ratios = f"{'reference/kernel':>24}{'conv1d/kernel':>24}"
    yield f"{'size (B, L, E, K)':<29}{'threads':>8}{'ms':>8}{ratios}"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, size in SIZES.items():
                times = interleave(make_contenders(size))
                others = [
                    f"{ratio(times[x], times['kernel']):>24}" for x in ("reference", "conv1d")
                ]
                kernel = f"{median(times['kernel']):>8.3f}"
                yield f"{name + ' ' + str(size):<29}{threads:>8}{kernel}{''.join(others)}"
    finally:
        torch.set_num_threads(before)


def write_table():
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_causal_conv_speed():
    write_table()


if __name__ == "__main__":
    write_table()
