"""Kernels of one pass over memory against torch's operations one by one, on the CPU.

python tests/benchmarks/kernels/bench_pointwise.py
python -m pytest -s tests/benchmarks/kernels/bench_pointwise.py
"""

import sys

import pytest
import torch

from kernels.dispatch import warm
from kernels.rowwise.rms_norm import rms_norm, rms_norm_reference
from kernels.rowwise.rotary import rotate_halves
from kernels.rowwise.swiglu import swiglu
from kernels.scans.rglru import rglru, rglru_reference
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio
from tests.kernels.rowwise.test_rotary import one_by_one as turned_one_by_one

TOKENS = 2048
EPS = 1e-5


def gated_one_by_one(joint):
    gate, up = joint.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gates(function):
    begins = torch.zeros(1, TOKENS, dtype=torch.bool)
    return lambda keep, write, rate, wanted: function(keep, write, rate, begins, wanted)


def turns(function):
    angles = torch.rand(1, TOKENS, 1, 64)
    return lambda x: function(x, angles.cos(), angles.sin())


def cases():
    """By name: the kernel, the operations, and the shapes of what both differentiate by."""
    tokens = (1, TOKENS, 512)
    return {
        "norm": (
            lambda x, w: rms_norm(x, w, EPS),
            lambda x, w: rms_norm_reference(x, w, EPS),
            [tokens, (512,)],
        ),
        "norm of 8 heads": (
            lambda x, w: rms_norm(x, w, EPS, 8),
            lambda x, w: rms_norm_reference(x, w, EPS, 8),
            [tokens, (512,)],
        ),
        "gated norm": (
            lambda x, g, w: rms_norm(x, w, EPS, gate=g),
            lambda x, g, w: rms_norm_reference(x, w, EPS, gate=g),
            [(1, TOKENS, 1024), (1, TOKENS, 1024), (1024,)],
        ),
        "SwiGLU": (swiglu, gated_one_by_one, [(1, TOKENS, 2736)]),
        "rotary": (turns(rotate_halves), turns(turned_one_by_one), [(1, TOKENS, 8, 64)]),
        "RG-LRU": (gates(rglru), gates(rglru_reference), [tokens, tokens, (512,), tokens]),
    }


def make_contenders(kernel, operations, shapes):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.rand(shape, generator=generator).requires_grad_() for shape in shapes]

    def both(function):
        def run():
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

        return run

    return {"kernel": both(kernel), "operations": both(operations)}


def table():
    """One line for each kernel."""
    warm()
    yield f"forward and back, {TOKENS:,} tokens, median of {ROUNDS} interleaved rounds [quartiles]"
    yield f"{'kernel':<20}{'ms':>9}{'operations/kernel':>24}"
    for name, case in cases().items():
        times = interleave(make_contenders(*case))
        share = ratio(times["operations"], times["kernel"])
        yield f"{name:<20}{median(times['kernel']):>9.2f}{share:>24}"


def write_table():
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_pointwise_speed():
    write_table()


if __name__ == "__main__":
    write_table()
