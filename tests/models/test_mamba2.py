"""Mamba-2 against a float64 loop, Mamba-1, and its published numbers."""

import math

import numpy as np
import pytest
import torch

from kernels.scans import ssd as kernel
from models.accounting import account, total_parameters
from models.backbone import BackboneConfig, BlockConfig, build_backbone, undecayed
from models.bases.ssm import GroupedNorm
from models.channel import NoChannelConfig
from models.mixer import Slot
from models.mixers.recurrent import mamba
from models.mixers.recurrent.mamba2 import Mamba2, Mamba2Config
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import ssd as oracle

PUBLISHED = [
    (24, 768, 128_989_632),
    (48, 1024, 368_346_624),
    (48, 1536, 780_161_280),
    (48, 2048, 1_343_757_312),
    (64, 2560, 2_702_599_680),
]


def published(n_layers: int, d_model: int, vocab_size: int = 50_288, **fields) -> BackboneConfig:
    return BackboneConfig(
        blocks={"m": BlockConfig(Mamba2Config(**fields), NoChannelConfig())},
        pattern="m",
        n_layers=n_layers,
        d_model=d_model,
        vocab_size=vocab_size,
    )


def small(**fields) -> Mamba2:
    mixer = build("mamba2", **{"d_state": 6, "head_dim": 4, **fields})
    assert isinstance(mixer, Mamba2)
    return mixer


def arrays(mixer: Mamba2) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}


@pytest.mark.parametrize(("n_groups", "limit"), [(1, None), (2, None), (4, (0.02, 0.05))])
def test_mamba2_equals_a_float64_loop(n_groups, limit):
    mixer, x, documents = small(n_groups=n_groups, dt_limit=limit), inputs(23), packed((6, 17))
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    bounds = limit or (0.0, np.inf)
    for row in range(2):
        own = (x[row].numpy(), documents[row].numpy())
        wanted = oracle.mamba2(arrays(mixer), *own, n_groups, bounds)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 5e-6


def test_its_matrix_is_the_semiseparable_one():
    mixer, x, documents = small(n_groups=2), inputs(14, rows=1), packed((5, 9), rows=1)
    _, (dt, B, C, _) = mixer.project(x, WholeSequence(documents))
    got = mixer.materialize(x, WholeSequence(documents))[0].detach().double().numpy()
    parts = [part[0].detach().double().numpy() for part in (dt, B, C)]
    w = arrays(mixer)
    wanted = oracle.matrix(parts[0], -np.exp(w["A_log"]), *parts[1:], documents[0].numpy())
    wanted += w["D"][:, None, None] * np.eye(14)
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_blocks_below_the_diagonal_have_the_states_rank():
    mixer, x = small(d_state=3).double(), inputs(30, rows=1).double()
    matrix = mixer.materialize(x, whole(30, rows=1))[0, 0].detach()
    for cut in (5, 14, 25):
        singular = torch.linalg.svdvals(matrix[cut:, :cut])
        assert (singular > 1e-10 * singular[0]).sum() == 3


def test_equal_rates_and_steps_make_mambas_matrix_the_same():
    E, N, sequence = 32, 6, whole(20, rows=1)
    two, one = small().double(), build("mamba", d_state=N).double()
    values, own = two.project(inputs(20, rows=1).double(), sequence)
    with torch.no_grad():
        one.A_log.copy_(two.A_log.repeat_interleave(4)[:, None].expand(E, N))
        one.D.copy_(two.D.repeat_interleave(4))
    dt = own.dt.repeat_interleave(4, dim=2)
    tied = mamba.Coefficients(dt, own.B[:, :, 0], own.C[:, :, 0], own.gate)
    wanted = two.mix(values, own, sequence).flatten(2)
    got = one.mix(values.flatten(2).unsqueeze(-1), tied, sequence).squeeze(-1)
    assert (got - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize("limit", [(0.0, 0.03), (0.04, 0.05)])
def test_a_limit_on_steps_holds_in_every_piece(limit):
    mixer, x, documents = small(dt_limit=limit), inputs(20), packed((20,))
    free = small()(x, WholeSequence(documents))
    whole_outputs, state, pieces = mixer(x, WholeSequence(documents)), None, []
    for t in range(20):
        sequence = ContinuedSequence(documents[:, t : t + 1], state)
        sequence.enter_layer()
        pieces.append(mixer(x[:, t : t + 1], sequence))
        sequence.leave_layer()
        state = sequence.state()
    assert (torch.cat(pieces, dim=1) - whole_outputs).norm() < 2e-6 * whole_outputs.norm()
    assert (free - whole_outputs).norm() > 1e-3 * whole_outputs.norm()


def test_outputs_and_gradients_do_not_depend_on_the_chunk_length(monkeypatch):
    mixer, x, runs = small().double(), inputs(40).double(), []
    for chunk in (40, 1, 16):
        monkeypatch.setattr(kernel, "CHUNK", chunk)
        outputs = mixer(x, whole(40))
        runs.append([outputs, *torch.autograd.grad(outputs.square().sum(), mixer.parameters())])
    for run in runs[1:]:
        assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(run, runs[0], strict=True))


def test_immense_steps_give_finite_outputs_and_gradients():
    mixer, x = small(), inputs(600)
    with torch.no_grad():
        mixer.dt_bias.fill_(20.0)
        mixer.A_log.fill_(math.log(16.0))
    outputs = mixer(x, whole(600))
    gradients = torch.autograd.grad(outputs.square().sum(), mixer.parameters())
    assert all(tensor.isfinite().all() for tensor in (outputs, *gradients))


def test_groups_are_normalised_apart():
    norm, x = GroupedNorm(8, 2), inputs(3)[..., :8]
    torch.nn.init.ones_(norm.weight)
    louder = torch.cat([100 * x[..., :4], x[..., 4:]], dim=-1)
    gate = torch.ones_like(x)
    assert torch.equal(norm(louder, gate)[..., 4:], norm(x, gate)[..., 4:])
    assert torch.allclose(
        norm(x, gate).unflatten(2, (2, 4)).square().mean(-1), torch.ones(2, 3, 2), atol=1e-3
    )


@pytest.mark.parametrize(("n_layers", "d_model", "total"), PUBLISHED)
def test_published_parameter_totals(n_layers, d_model, total):
    assert total_parameters(published(n_layers, d_model)) == total


@pytest.mark.parametrize(
    ("d_model", "n_groups", "d_state", "d_conv"), [(64, 1, 16, 4), (48, 2, 5, 3)]
)
def test_parameters_of_a_layer_follow_the_formula(d_model, n_groups, d_state, d_conv):
    config = Mamba2Config(d_state=d_state, n_groups=n_groups, d_conv=d_conv, head_dim=8)
    mixer = config.build(Slot(d_model))
    E, GN = 2 * d_model, n_groups * d_state
    H = E // 8
    wanted = d_model * (3 * E + 2 * GN + H) + (E + 2 * GN) * (d_conv + 1) + 3 * H + E
    assert sum(p.numel() for p in mixer.parameters()) == wanted


@pytest.mark.parametrize("length", [7, 64, 150])
def test_scan_flops_equal_a_counted_loop(length):
    mixer = small(n_groups=2)
    products, elementwise = oracle.counted_scan_flops(length, kernel.CHUNK, 8, 4, 2, 6)
    flops, skip = mixer.mix_flops(length, length), 2 * 32 * length
    assert flops.needed == products
    assert flops.elementwise == elementwise + skip


def test_full_square_follows_the_cards_formula_in_whole_chunks():
    E, N, L, Q = 4096, 128, 4096, kernel.CHUNK
    mixer = Mamba2Config().build(Slot(2048))
    per_token = mixer.mix_flops(L, L).full_square / L
    assert per_token == 2 * Q * N + 2 * Q * E + 2 * N * E + 2 * N * E
    assert Q != 64 or per_token == pytest.approx(2.64e6, rel=0.01)


def test_initial_values_are_those_of_the_release():
    backbone = build_backbone(published(6, 64, 257, head_dim=2, A_init_range=(2.0, 5.0)), seed=3)
    for layer in backbone.layers:
        mixer = layer.mixer
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert torch.all((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001))
        assert dt.log().std() > 0.8 * math.log(100) / math.sqrt(12)
        rates = mixer.A_log.exp()
        assert torch.all((rates >= 2.0) & (rates <= 5.0))
        assert rates.std() > 0.8 * 3 / math.sqrt(12)
        assert torch.all(mixer.D == 1)
        assert torch.all(mixer.norm.weight == 1)
        bound = 128**-0.5 / math.sqrt(6)
        assert bound * 0.98 < mixer.out_proj.weight.abs().max() <= bound
        assert 0.5 * 0.9 < mixer.conv.weight.abs().max() <= 0.5
        assert 0.98 / 8 < mixer.in_proj.weight.abs().max() <= 1 / 8


def test_decays_diagonal_and_step_biases_are_spared_weight_decay():
    names = undecayed(build_backbone(published(1, 64, 257, head_dim=4), seed=0))
    assert {f"layers.0.mixer.{name}" for name in ("A_log", "D", "dt_bias")} <= names


def test_decoding_state_does_not_grow_with_the_context():
    config = published(2, 32, 257, head_dim=8, d_state=16)
    short, long = (account(config, length) for length in (16, 512))
    assert short.state_bytes == long.state_bytes == 2 * 4 * (64 * 16 + (64 + 32) * 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 does not divide the inner width 32"),
        ({"head_dim": 8, "n_groups": 3}, "n_groups 3 does not divide the 4 heads"),
        ({"dt_limit": (0.2, 0.1)}, "dt_limit"),
        ({"A_init_range": (0.0, 1.0)}, "A_init_range"),
        ({"d_state": 0}, "d_state 0 is not positive"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Mamba2Config(**fields).build(Slot(16))
