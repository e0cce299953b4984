"""Mamba against a float64 recurrence, its matrix, and its published numbers."""

import math

import numpy as np
import pytest
import torch

from models.accounting import account, total_parameters
from models.backbone import BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig
from models.mixers.recurrent.mamba import Mamba, MambaConfig
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed
from tests.oracles import mixers as oracle

PUBLISHED = [
    (24, 768, 129_135_360),
    (48, 1024, 371_516_416),
    (48, 1536, 793_204_224),
    (48, 2048, 1_372_178_432),
    (64, 2560, 2_768_345_600),
]


def published(n_layers: int, d_model: int, vocab_size: int = 50_280) -> BackboneConfig:
    return BackboneConfig(
        blocks={"m": BlockConfig(MambaConfig(), NoChannelConfig())},
        pattern="m",
        n_layers=n_layers,
        d_model=d_model,
        vocab_size=vocab_size,
    )


def test_mamba_equals_a_float64_recurrence() -> None:
    mixer, x, documents = build("mamba"), inputs(23), packed((6, 17))
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    for row in range(2):
        wanted = oracle.mamba(weights, x[row].numpy(), documents[row].numpy())
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 5e-6


def test_its_matrix_is_the_semiseparable_one() -> None:
    mixer, x, documents = build("mamba"), inputs(14, rows=1), packed((5, 9), rows=1)
    assert isinstance(mixer, Mamba)
    sequence = WholeSequence(documents)
    _, (dt, B, C, _) = mixer.project(x, sequence)
    matrix = mixer.materialize(x, sequence)[0].detach().double().numpy()
    A = -np.exp(mixer.A_log.detach().double().numpy())
    D = mixer.D.detach().double().numpy()
    parts = [part[0].detach().double().numpy() for part in (dt, B, C)]
    wanted = oracle.semiseparable(parts[0], A, parts[1], parts[2], D, documents[0].numpy())
    assert np.abs(matrix - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("n_layers", "d_model", "total"), PUBLISHED)
def test_published_parameter_totals(n_layers: int, d_model: int, total: int) -> None:
    assert total_parameters(published(n_layers, d_model)) == total


def test_scan_flops_equal_a_counted_loop() -> None:
    mixer = build("mamba")
    E, N = mixer.A_log.shape
    counted = oracle.counted_scan_flops(7, E, N)
    assert mixer.mix_flops(7, 7).elementwise == counted


def test_initial_values_are_those_of_the_release() -> None:
    backbone = build_backbone(published(6, 64, 257), seed=3)
    for layer in backbone.layers:
        mixer = layer.mixer
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert torch.all((dt >= 1e-4 * 0.999) & (dt <= 0.1 * 1.001))
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(128, 16))
        assert torch.all(mixer.D == 1)
        assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
        bound = 128**-0.5 / math.sqrt(6)
        assert bound * 0.98 < mixer.out_proj.weight.abs().max() <= bound
        assert 0.5 * 0.9 < mixer.conv.weight.abs().max() <= 0.5
    std = backbone.embedding.weight.std()
    assert 0.019 < std < 0.021


def test_decoding_state_does_not_grow_with_the_context() -> None:
    short, long = (account(published(2, 32, 257), length) for length in (16, 512))
    assert short.state_bytes == long.state_bytes == 2 * 4 * (64 * 16 + 64 * 3)
