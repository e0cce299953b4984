"""Monarch matrices: their entries, and the DFT as one."""

import numpy as np
import pytest
import torch

from models.parts.monarch_matrix import monarch_multiply
from tests.models.conftest import monarch_entries
from tests.oracles import monarch as oracle


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dft(x, n1, n2, inner=None):
    """The DFT of x [..., n1 n2] by two Monarch factors, or with another transform as the second."""
    first, second = (torch.from_numpy(w) for w in oracle.dft_factors(n1, n2))
    x = x.unflatten(-1, (n1, n2)).transpose(-1, -2).flatten(-2)
    if inner is None:
        return monarch_multiply(x, first, second)
    pieces = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (n2, n1)), first)
    return inner(pieces.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def test_entries_are_those_of_the_formula():
    first, second = gaussian(4, 4, 4), gaussian(4, 4, 4, seed=1)
    wanted = oracle.product(first.numpy(), second.numpy())
    assert np.array_equal(monarch_entries(first, second).numpy(), wanted)


def test_slices_have_rank_one():
    matrix = monarch_entries(gaussian(5, 5, 5), gaussian(5, 5, 5, seed=1)).view(5, 5, 5, 5)
    ranks = torch.linalg.matrix_rank(matrix.permute(2, 1, 0, 3), tol=1e-9)
    assert torch.all(ranks == 1)


def test_rectangular_factors_map_between_widths():
    first, second = gaussian(3, 8, 5), gaussian(4, 7, 6, seed=1)
    matrix = monarch_entries(first, second)
    assert matrix.shape == (28, 15)
    x = gaussian(2, 15, seed=2)
    assert torch.allclose(monarch_multiply(x, first, second), x @ matrix.t(), atol=1e-12)


@pytest.mark.parametrize(
    ("n1", "n2"), [(4, 4), (8, 8), (3, 5), (16, 8), (8, 16), (32, 16), (7, 9), (1, 6), (6, 1)]
)
def test_the_dft_is_a_monarch_matrix(n1, n2):
    x = torch.complex(gaussian(2, n1 * n2), gaussian(2, n1 * n2, seed=1))
    wanted = np.fft.fft(x.numpy())
    assert np.abs(dft(x, n1, n2).numpy() - wanted).max() < 1e-12 * np.abs(wanted).max()


def test_the_dft_of_order_three_is_one_within_another():
    x = torch.complex(gaussian(2, 8 * 8 * 6), gaussian(2, 8 * 8 * 6, seed=1))
    wanted = np.fft.fft(x.numpy())
    found = dft(x, 8, 48, inner=lambda z: dft(z, 8, 6))
    assert np.abs(found.numpy() - wanted).max() < 1e-12 * np.abs(wanted).max()
