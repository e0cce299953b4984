"""SSD against the products of matrices that it consists of, on the CPU.

The products are the floor: those of the forward pass, and those of the backward pass with the
states between chunks computed once more. Run as a script or with pytest:

    python tests/benchmarks/kernels/bench_ssd.py
    python -m pytest -s tests/benchmarks/kernels/bench_ssd.py
"""

import sys

import pytest
import torch

from kernels.scans.ssd import CHUNK, ssd
from tests.benchmarks.kernels.timing import ROUNDS, interleave, median, ratio

SIZES = {
    "tiny": (8, 256, 6, 8, 16),
    "ragged": (8, 250, 6, 8, 16),
    "goal": (1, 1024, 16, 64, 64),
    "wide state": (2, 1024, 16, 64, 128),
}


def make_contenders(size):
    """The things to time, by name; the first two are the floors."""
    batch, L, H, P, N = size
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(batch, L, H, P, generator=generator) for _ in range(2))
    dt = torch.rand(batch, L, H, generator=generator) * 0.1
    A = -1.0 - 15.0 * torch.rand(H, generator=generator)
    B, C = (torch.randn(batch, L, 1, N, generator=generator) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (values, dt, A, B, C)]
    forward, backward = make_products(size)

    def products():
        for left, right, out in forward:
            torch.bmm(left, right, out=out)

    def all_products():
        products()
        for left, right, out in backward:
            torch.bmm(left, right, out=out)

    return {
        "products": products,
        "all products": all_products,
        "forward": lambda: ssd(values, dt, A, B, C),
        "both": lambda: torch.autograd.grad(ssd(*leaves).outputs, leaves, gradient),
    }


def make_products(size):
    """Factors and results of every product, forward and back, in whole chunks."""
    batch, L, H, P, N = size
    Q, chunks = CHUNK, batch * -(-L // CHUNK)
    B, C = torch.randn(chunks, Q, N), torch.randn(chunks, Q, N)
    tokens, states = torch.randn(chunks, Q, H * P), torch.randn(chunks, N, H * P)
    heads, matrix = torch.randn(chunks * H, Q, P), torch.randn(chunks * H, Q, Q)
    pairs = torch.randn(chunks, Q, Q)
    square, small = torch.empty_like(pairs), torch.empty_like(B)
    all_tokens, all_states = torch.empty_like(tokens), torch.empty_like(states)
    all_heads, squares = torch.empty_like(heads), torch.empty_like(matrix)
    scores, into = (C, B.mT, square), (B.mT, tokens, all_states)
    out_of, inside = (C, states, all_tokens), (matrix, heads, all_heads)
    once_more = [scores, into]
    inside_back = [(heads, heads.mT, squares), (matrix.mT, heads, all_heads)]
    shared_back = [(pairs, B, small), (pairs.mT, C, small)]
    states_back = [into, out_of, out_of] + 2 * [(tokens, states.mT, small)]
    return [scores, into, out_of, inside], once_more + inside_back + shared_back + states_back


def table():
    """One line for each size and number of threads."""
    yield f"median of {ROUNDS} interleaved rounds [quartiles]; ratios to the products alone"
    yield f"{'size (B, L, H, P, N)':<34}{'threads':>8}{'ms':>9}{'forward':>22}{'and backward':>22}"
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, size in SIZES.items():
                times = interleave(make_contenders(size))
                ratios = [
                    f"{ratio(times[x], times[floor]):>22}"
                    for x, floor in (("forward", "products"), ("both", "all products"))
                ]
                floor = f"{median(times['products']):>9.3f}"
                yield f"{name + ' ' + str(size):<34}{threads:>8}{floor}{''.join(ratios)}"
    finally:
        torch.set_num_threads(before)


def write_table():
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


@pytest.mark.benchmark
def test_ssd_speed():
    write_table()


if __name__ == "__main__":
    write_table()
