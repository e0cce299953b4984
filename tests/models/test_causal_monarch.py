"""The learned causal Monarch matrix against its entries."""

import numpy as np
import pytest
import torch

from models.mixer import Slot
from models.mixers.convolution.causal_monarch import CausalMonarchConfig
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import monarch as oracle


def matrix_of(mixer, length):
    """Its own matrix, the identity that the block around it adds left out."""
    made = mixer.materialize(inputs(length, rows=1), whole(length, rows=1))[0].detach().double()
    return (made - torch.eye(length)).numpy()


def wanted_of(mixer, length):
    factors = [getattr(mixer, name).detach().double().numpy() for name in ("inside", "first")]
    second = mixer.second.detach().double().numpy()
    heads = zip(*factors, second, strict=True)
    return np.stack([oracle.causal_product(*head, mixer.block) for head in heads])[
        :, :length, :length
    ]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 49, 50])
def test_every_entry_is_that_of_the_definition(length):
    mixer = build("causal_monarch", max_len=50)
    assert mixer.block == 8
    assert np.abs(matrix_of(mixer, length) - wanted_of(mixer, length)).max() < 1e-6


def test_it_is_causal_and_leaves_no_pair_out():
    matrix = matrix_of(build("causal_monarch"), 64)
    assert np.count_nonzero(np.triu(matrix, 1)) == 0
    assert np.abs(matrix).min(initial=1.0, where=np.tri(64, dtype=bool)) > 0


def test_slices_between_blocks_have_rank_one_and_those_within_do_not():
    matrix = matrix_of(build("causal_monarch"), 64)[0].reshape(8, 8, 8, 8)
    ranks = {
        (i, S): np.linalg.matrix_rank(matrix[S + 1 :, i, S, :], tol=1e-6)
        for i in range(8)
        for S in range(7)
    }
    assert set(ranks.values()) == {1}
    assert np.linalg.matrix_rank(matrix[3, :, 3, :], tol=1e-6) == 8
    assert np.linalg.matrix_rank(matrix[3:, :, :3, :].reshape(40, 24), tol=1e-6) == 24


def test_the_place_in_the_document_decides():
    mixer, x = build("causal_monarch"), inputs(40, rows=1)
    rows = mixer.materialize(x, WholeSequence(packed((11, 29), rows=1)))[0].detach()
    assert torch.allclose(
        rows[:, 11:, 11:], torch.tensor(matrix_of(mixer, 29)).float() + torch.eye(29), atol=1e-6
    )


@pytest.mark.parametrize("max_len", [1, 2, 3, 16, 50, 64])
def test_every_parameter_is_used_and_counted(max_len):
    H, b = 2, int(np.ceil(np.sqrt(max_len)))
    K = -(-max_len // b)
    mixer = CausalMonarchConfig(n_heads=H, max_len=max_len).build(Slot(16))
    own = mixer.inside.numel() + mixer.first.numel() + mixer.second.numel()
    assert own == H * (K * b * (b + 1) // 2 + (K - 1) * b * b + b * K * (K - 1) // 2)
    mixer = build("causal_monarch", max_len=K * b)
    mixer(inputs(K * b), whole(K * b)).square().sum().backward()
    for factor in (mixer.inside, mixer.first, mixer.second):
        assert factor.numel() == 0 or torch.count_nonzero(factor.grad) == factor.numel()


def test_flops_count_the_entries_of_the_factors_once():
    mixer = build("causal_monarch")
    entries = sum(getattr(mixer, name)[0].numel() for name in ("inside", "first", "second"))
    assert mixer.multiply_flops(64, 64).needed == 2 * mixer.inner_width * entries


def test_a_longer_document_is_refused():
    with pytest.raises(ValueError, match=r"65 tokens, .* max_len is 64"):
        build("causal_monarch")(inputs(65), whole(65))
