"""The long convolution against plain torch FFTs, and token by token against the plain sum, on CPU.

python tests/benchmarks/kernels/bench_long_conv.py
python -m pytest -s tests/benchmarks/kernels/bench_long_conv.py
"""

import sys
import time

import pytest
import torch

from kernels.convolution.long_conv import long_conv
from kernels.convolution.online_conv import extend_blocks
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio

SIZES = {
    "short": (32, 64, 256, 1),
    "embedded study": (8, 512, 256, 1),
    "packed": (8, 512, 256, 6),
    "long": (2, 2048, 256, 1),
}
"""Rows, tokens, channels, documents a row."""
CONTEXTS = (256, 1024, 4096)
CHANNELS = 256


def torch_conv(values, filter, documents):
    """Both spectra of all channels at once, kept for the backward pass."""
    pieces = documents[0].unique_consecutive(return_counts=True)[1].tolist()
    outputs = []
    for part in values.split(pieces, dim=1):
        L = part.shape[1]
        spectrum = torch.fft.rfft(part.transpose(1, 2), n=2 * L)
        spectrum = spectrum * torch.fft.rfft(filter[:, :L], n=2 * L)
        outputs.append(torch.fft.irfft(spectrum, n=2 * L)[..., :L].transpose(1, 2))
    return torch.cat(outputs, dim=1)


def make_contenders(size):
    """Forward and backward of both; the first is the kernel."""
    batch, L, E, count = size
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in ((batch, L, E), (E, L))]
    gradient = torch.randn(batch, L, E, generator=generator)
    documents = (torch.arange(L) * count // L).int().expand(batch, L)
    ids = documents if count > 1 else None

    def both(outputs):
        return lambda: torch.autograd.grad(outputs(), leaves, gradient)

    return {
        "kernel": both(lambda: long_conv(*leaves, ids)),
        "torch": both(lambda: torch_conv(*leaves, documents)),
    }


@torch.no_grad()
def decode_by_blocks(values, filter):
    """Milliseconds a token."""
    blocks, begin = [], time.perf_counter()
    for token in values.split(1, dim=1):
        _, blocks = extend_blocks(token, lambda count: filter[:, :count], blocks)
    return 1e3 * (time.perf_counter() - begin) / values.shape[1]


@torch.no_grad()
def decode_by_sums(values, filter):
    """Milliseconds a token, with inputs and taps in the layout that suits the sum best."""
    backwards, begin = filter.flip(1).t().contiguous(), time.perf_counter()
    for t in range(values.shape[1]):
        (values[:, : t + 1] * backwards[-t - 1 :]).sum(dim=1)
    return 1e3 * (time.perf_counter() - begin) / values.shape[1]


def table():
    """One line for each size, then one for each context."""
    yield f"forward and backward, median of {ROUNDS} interleaved rounds [quartiles], one thread"
    yield f"{'size (B, L, E, documents)':<40}{'ms':>8}{'torch/kernel':>24}"
    for name, size in SIZES.items():
        times = interleave(make_contenders(size))
        slower = ratio(times["torch"], times["kernel"])
        yield f"{name + ' ' + str(size):<40}{median(times['kernel']):>8.2f}{slower:>24}"
    yield f"decoding, {CHANNELS} channels, milliseconds a token"
    yield f"{'tokens':<40}{'blocks':>8}{'sums':>24}"
    for length in CONTEXTS:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(1, length, CHANNELS, generator=generator)
        filter = torch.randn(CHANNELS, length, generator=generator)
        blocks, sums = (decode(values, filter) for decode in (decode_by_blocks, decode_by_sums))
        yield f"{length:<40}{blocks:>8.3f}{sums:>24.3f}"


def write_table():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for line in table():
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    finally:
        torch.set_num_threads(before)


@pytest.mark.benchmark
def test_long_conv_speed():
    write_table()


if __name__ == "__main__":
    write_table()
