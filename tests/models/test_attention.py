"""Attention against a float64 loop over keys."""

import numpy as np
import pytest
import torch

from models.mixer import Slot
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, build, inputs, packed, whole
from tests.oracles import mixers as oracle


def test_attention_equals_a_loop_over_keys() -> None:
    mixer, x, documents = build("attention"), inputs(23), packed((6, 17))
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    for row in range(2):
        wanted = oracle.attention(weights, x[row].numpy(), documents[row].numpy(), 2, 1e4)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 2e-6


def test_scores_depend_on_distance_alone() -> None:
    mixer, x = build("attention"), inputs(8)
    shifted = torch.cat([torch.zeros_like(x[:, :5]), x], dim=1)
    documents = torch.zeros(2, 13, dtype=torch.int32)
    matrix = mixer.materialize(x, whole(8))
    moved = mixer.materialize(shifted, WholeSequence(documents))[:, :, 5:, 5:]
    ratio = moved / matrix.clamp(min=1e-9)
    lower = torch.tril(torch.ones(8, 8, dtype=torch.bool))
    per_query = ratio[..., :, :1].expand_as(ratio)
    assert torch.allclose(ratio[..., lower], per_query[..., lower], rtol=1e-4)


def test_rescaling_queries_and_keys_changes_nothing_under_qk_norm() -> None:
    mixer, x = build("attention"), inputs(12)
    before = mixer(x, whole(12))
    with torch.no_grad():
        mixer.qkv.weight[: 2 * D_MODEL] *= 64
    after = mixer(x, whole(12))
    assert torch.allclose(before, after, atol=2e-4)


def test_grouped_keys_equal_repeated_ones() -> None:
    grouped = AttentionConfig(n_heads=4, n_kv_heads=2, initial_std=0.3).build(Slot(D_MODEL))
    full = AttentionConfig(n_heads=4, initial_std=0.3).build(Slot(D_MODEL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in grouped.modules():
            for name, p in module.named_parameters(recurse=False):
                p.copy_(module.draw(name, generator))
        q, k, v = grouped.qkv.weight.split([16, 8, 8])
        repeated = [w.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16) for w in (k, v)]
        full.qkv.weight.copy_(torch.cat([q, *repeated]))
        full.out.weight.copy_(grouped.out.weight)
        for norm in ("q_norm", "k_norm"):
            getattr(full, norm).weight.fill_(1.0)
    x = inputs(12)
    assert torch.allclose(grouped(x, whole(12)), full(x, whole(12)), atol=1e-6)


def test_heads_that_do_not_fit_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"n_heads 3 .* d_model 16 .* choose from 1, 2, 4, 8"):
        AttentionConfig(n_heads=3).build(Slot(16))
