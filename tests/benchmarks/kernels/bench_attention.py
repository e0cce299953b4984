"""Attention by the compiled kernel against torch's fused attention and its plain form, on the CPU.

python tests/benchmarks/kernels/bench_attention.py
python -m pytest -s tests/benchmarks/kernels/bench_attention.py
"""

import sys

import pytest
import torch
from torch.nn import functional

from kernels.attention.packed_attention import packed_attention
from kernels.attention.window_attention import window_attention, window_attention_reference
from kernels.dispatch import warm
from tests.benchmarks.kernels.timing import interleave, median, ratio

ROUNDS = 12
CAUSAL = {
    "256": (8, 256, 8, 64),
    "512": (4, 512, 8, 64),
    "1,024": (2, 1024, 8, 64),
    "2,048": (1, 2048, 8, 64),
    "4,096": (1, 4096, 8, 64),
}
WINDOWED = {"64": (2, 1024, 8, 64), "128": (2, 1024, 8, 64), "256": (2, 1024, 8, 64)}


def make_leaves(size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for _ in range(4)]


def forward_and_back(attend, leaves):
    *inputs, gradient = leaves
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient.detach())


def fused(queries, keys, values):
    heads = (x.transpose(1, 2) for x in (queries, keys, values))
    return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def causal_contenders(size):
    """One causal document; the second is the floor."""
    leaves, ids = make_leaves(size), torch.zeros(size[0], size[1], dtype=torch.int32)

    def ours(*inputs):
        return packed_attention(*inputs, ids, causal=True)

    return {"kernel": forward_and_back(ours, leaves), "other": forward_and_back(fused, leaves)}


def window_contenders(size, window):
    """A window; the second is torch's fused attention with a mask."""
    leaves = make_leaves(size)

    def by(attend):
        return forward_and_back(lambda *inputs: attend(*inputs, window), leaves)

    return {"kernel": by(window_attention), "other": by(window_attention_reference)}


def line(name, size, contenders):
    times = interleave(contenders, ROUNDS)
    share = ratio(times["kernel"], times["other"])
    return f"{name + ' ' + str(size):<36}{median(times['kernel']):>9.2f}{share:>22}"


def table():
    """One line for each size."""
    warm()
    yield f"forward and back, median of {ROUNDS} interleaved rounds [quartiles]"
    yield f"{'size (B, L, H, P)':<36}{'ms':>9}{'kernel/torch':>22}"
    for name, size in CAUSAL.items():
        yield line(f"causal {name}", size, causal_contenders(size))
    for name, size in WINDOWED.items():
        yield line(f"window {name}", size, window_contenders(size, int(name)))


def write_table():
    for each in table():
        sys.stdout.write(each + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_attention_speed():
    write_table()


if __name__ == "__main__":
    write_table()
