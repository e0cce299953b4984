"""The gated recurrence against float64 loops, its initial memory, and its precision."""

import numpy as np
import pytest
import torch

from models.accounting import account
from models.backbone import BackboneConfig, BlockConfig, build_backbone, undecayed
from models.channel import NoChannelConfig
from models.mixer import Mixer, Slot
from models.mixers.recurrent.gated_recurrence import GatedRecurrence, GatedRecurrenceConfig
from models.parts.gates import RGLRU
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import gated_recurrence as oracle

MODES = ("rglru", "mingru")


def ordinary(mixer: Mixer) -> Mixer:
    """The mixer with biases and Lambda that are not those of the start, in float64."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.double()


def weights_of(mixer: Mixer) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in mixer.named_parameters()}


def backbone_config(mode: str = "rglru", d_model: int = 64) -> BackboneConfig:
    block = BlockConfig(GatedRecurrenceConfig(n_heads=4, mode=mode), NoChannelConfig())
    return BackboneConfig({"g": block}, "g", n_layers=6, d_model=d_model, vocab_size=257)


@pytest.mark.parametrize("mode", MODES)
def test_it_equals_a_float64_loop(mode):
    mixer = ordinary(build("gated_recurrence", mode=mode))
    x, documents = inputs(29).double(), packed((6, 1, 22))
    got = mixer(x, WholeSequence(documents)).detach().numpy()
    for row in range(2):
        wanted = oracle.gated_recurrence(
            weights_of(mixer), x[row].numpy(), documents[row].numpy(), mode
        )
        assert np.linalg.norm(got[row] - wanted) < 1e-12 * np.linalg.norm(wanted)


@pytest.mark.parametrize("mode", MODES)
def test_its_matrix_holds_products_of_decays(mode):
    mixer = ordinary(build("gated_recurrence", mode=mode))
    x, documents = inputs(14, rows=1).double(), packed((5, 9), rows=1)
    sequence = WholeSequence(documents)
    _, coefficients = mixer.project(x, sequence)
    log_decay, write = (part[0].detach().numpy() for part in coefficients.steps)
    matrix = mixer.materialize(x, sequence)[0].detach().numpy()
    wanted = oracle.matrix(np.exp(log_decay), write, documents[0].numpy())
    assert np.abs(matrix - wanted).max() < 1e-12 * np.abs(wanted).max()


def test_the_first_token_of_a_document_writes_its_gated_value_unscaled():
    mixer = ordinary(build("gated_recurrence"))
    assert isinstance(mixer, GatedRecurrence)
    assert isinstance(mixer.gates, RGLRU)
    x, sequence = inputs(12).double(), WholeSequence(packed((7, 5)))
    values, coefficients = mixer.project(x, sequence)
    mixed = mixer.mix(values, coefficients, sequence)
    gate = torch.sigmoid(mixer.gates.input_gate(values.squeeze(-1)))
    for first in (0, 7):
        assert torch.allclose(mixed[:, first, :, 0], (gate[..., None] * values)[:, first, :, 0])


def test_initial_decays_are_those_of_the_paper():
    backbone = build_backbone(backbone_config(), seed=3)
    rates = [torch.nn.functional.softplus(layer.mixer.gates.Lambda) for layer in backbone.layers]
    open_gate = torch.exp(-8 * torch.cat(rates))
    assert torch.all((open_gate > 0.9 - 1e-6) & (open_gate < 0.999 + 1e-6))
    quantiles = torch.quantile(open_gate, torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(quantiles, torch.tensor([0.92475, 0.9495, 0.97425]), atol=0.006)
    half_open = torch.exp(-4 * torch.cat(rates)).median().item()
    assert half_open == pytest.approx(0.9745, abs=0.003)


@pytest.mark.parametrize("mode", MODES)
def test_other_initial_values_are_those_of_the_card(mode):
    backbone = build_backbone(backbone_config(mode, d_model=192), seed=3)
    mixer = backbone.layers[0].mixer
    E = mixer.out_proj.in_features
    assert E == 256
    assert mixer.in_proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.02)
    assert mixer.out_proj.weight.std().item() == pytest.approx((256 * 6) ** -0.5, rel=0.02)
    assert mixer.conv.weight.std().item() == pytest.approx(0.05, rel=0.1)
    for name, parameter in mixer.named_parameters():
        if name.startswith("gates") and name.endswith("weight"):
            assert parameter.std().item() == pytest.approx((E / 4) ** -0.5, rel=0.03)
        if name.endswith("bias"):
            assert torch.all(parameter == 0)


def test_lambda_and_biases_are_not_decayed():
    backbone = build_backbone(backbone_config(), seed=3)
    names = {name for name, p in backbone.named_parameters() if "Lambda" in name or "bias" in name}
    assert len(names) == 6 * 4
    assert names <= undecayed(backbone)


def test_a_gate_that_never_lets_go_has_finite_gradients():
    closed = build("gated_recurrence")
    with torch.no_grad():
        closed.gates.recurrence_gate.bias.fill_(-1e3)
    closed(inputs(20), whole(20)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in closed.parameters())


def test_decays_stay_in_float32_under_autocast():
    mixer, sequence = build("gated_recurrence"), whole(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, coefficients = mixer.project(inputs(20), sequence)
        mixed = mixer.mix(values, coefficients, sequence)
    assert values.dtype is mixed.dtype is torch.bfloat16
    assert all(part.dtype is torch.float32 for part in coefficients.steps)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_loses_nothing_over_a_long_slow_memory(mode):
    mixer, x = build("gated_recurrence", mode=mode), inputs(16_384, rows=1)
    with torch.no_grad():
        if mode == "rglru":
            mixer.gates.Lambda.fill_(-11.0)
        else:
            mixer.gates.update_gate.bias.fill_(-8.0)
        exact = mixer(x, whole(16_384, rows=1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = mixer(x, whole(16_384, rows=1)).float()
    early, late = (
        ((rounded - exact)[:, part].norm() / exact[:, part].norm()).item()
        for part in (slice(0, 256), slice(16_384 - 256, 16_384))
    )
    assert late < 0.02
    assert late < 1.5 * early


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d_conv", [1, 4])
def test_decoding_state_does_not_grow_with_the_context(mode, d_conv):
    block = BlockConfig(GatedRecurrenceConfig(4, mode, d_conv=d_conv), NoChannelConfig())
    config = BackboneConfig({"g": block}, "g", n_layers=2, d_model=48, vocab_size=257)
    short, long = (account(config, length) for length in (16, 512))
    E = GatedRecurrenceConfig(n_heads=4).channels(48)
    assert short.state_bytes == long.state_bytes == 2 * 4 * E * d_conv


def test_recurrence_flops_equal_a_counted_loop():
    mixer = build("gated_recurrence")
    counted = oracle.counted_recurrence_flops(7, mixer.out_proj.in_features)
    assert mixer.mix_flops(7, 7).elementwise == counted
    assert mixer.mix_flops(7, 7).needed == 0


@pytest.mark.parametrize(("d_model", "n_heads", "width"), [(768, 8, 1024), (1536, 8, 2048)])
def test_the_width_left_open_is_the_published_one(d_model, n_heads, width):
    assert GatedRecurrenceConfig(n_heads).channels(d_model) == width


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="n_heads 3 does not divide width 64; choose a divisor"):
        GatedRecurrenceConfig(n_heads=3, width=64)
    with pytest.raises(ValueError, match="d_conv 0 is not positive; take 1 or more"):
        GatedRecurrenceConfig(n_heads=3, d_conv=0)
    mixer = GatedRecurrenceConfig(n_heads=3).build(Slot(16))
    assert mixer.out_proj.in_features % 3 == 0
