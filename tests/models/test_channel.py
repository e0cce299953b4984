"""Channel mixers: their formulas, counts, initial values, and which channels see which."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.channel import GELUConfig, MonarchMLPConfig, SwiGLUConfig, channel_kinds
from tests.models.conftest import monarch_entries

D, HIDDEN, RESIDUALS = 16, 32, 8
CONFIGS = (
    SwiGLUConfig(HIDDEN, 0.3),
    GELUConfig(HIDDEN, initial_std=0.3),
    GELUConfig(HIDDEN, bias=True, initial_std=None),
    *(MonarchMLPConfig(HIDDEN, 4, n, mixed) for n in (1, 2) for mixed in (False, True)),
)


def drawn(config, d_model=D):
    module = config.build(d_model, RESIDUALS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                parameter.copy_(part.draw(name, generator))
    return module.requires_grad_(False)


def tokens(count=5):
    return torch.randn(2, count, D, generator=torch.Generator().manual_seed(1))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def dense(block_map):
    """The matrix of a block-diagonal map, or of a Monarch one."""
    if hasattr(block_map, "first"):
        return monarch_entries(block_map.first.weight, block_map.second.weight).double().numpy()
    return torch.block_diag(*block_map.weight).double().numpy()


def sees(module, x):
    """Which inputs the gate and up channels depend on, (2 f, D)."""
    return torch.autograd.functional.jacobian(module.gate_up, x[0, 0]).abs() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_gelu_is_its_formula(bias):
    module, x = drawn(GELUConfig(HIDDEN, bias=bias, initial_std=0.3)), tokens()
    if bias:
        module.up.bias.normal_()
        module.down.bias.normal_()
    up, down = (w.weight.double().numpy() for w in (module.up, module.down))
    before, after = (w.bias.double().numpy() if bias else 0.0 for w in (module.up, module.down))
    wanted = gelu(x.double().numpy() @ up.T + before) @ down.T + after
    assert np.abs(module(x).double().numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("n_factors", [1, 2])
def test_the_monarch_mlp_gates_half_of_its_channels_with_the_other(n_factors):
    module, x = drawn(MonarchMLPConfig(HIDDEN, 4, n_factors)), tokens()
    module.down.bias.normal_()
    inner = x.double().numpy() @ dense(module.gate_up).T
    mixed = gelu(inner[..., :HIDDEN]) * inner[..., HIDDEN:]
    wanted = mixed @ dense(module.down).T + module.down.bias.double().numpy()
    assert np.abs(module(x).double().numpy() - wanted).max() < 1e-5


def test_interleaved_blocks_gate_their_own_channels():
    module, x = drawn(MonarchMLPConfig(HIDDEN, 4, 1, interleave=True)), tokens()
    inner = (x.double().numpy() @ dense(module.gate_up).T).reshape(2, 5, 4, 2, HIDDEN // 4)
    mixed = (gelu(inner[..., 0, :]) * inner[..., 1, :]).reshape(2, 5, HIDDEN)
    wanted = mixed @ dense(module.down).T
    assert np.abs(module(x).double().numpy() - wanted).max() < 1e-5


def test_one_factor_keeps_gates_and_values_apart_and_two_do_not():
    x, half = tokens(), D // 2
    released, two = (sees(drawn(MonarchMLPConfig(HIDDEN, 4, n)), x) for n in (1, 2))
    gates, values = released[:HIDDEN], released[HIDDEN:]
    assert gates[:, :half].any(dim=0).all()
    assert values[:, half:].any(dim=0).all()
    assert not gates[:, half:].any()
    assert not values[:, :half].any()
    assert two.all()


@pytest.mark.parametrize(
    ("d_model", "f", "nb"), [(768, 3072, 4), (16, 32, 4), (16, 32, 8), (16, 32, 1)]
)
def test_monarch_mlp_parameters_follow_the_closed_form(d_model, f, nb):
    with torch.device("meta"):
        one, two = (MonarchMLPConfig(f, nb, n).build(d_model, 1) for n in (1, 2))
    count = [sum(p.numel() for p in module.parameters()) for module in (one, two)]
    assert count[0] == 3 * d_model * f // nb + d_model
    assert count[1] == (3 * d_model * f + 2 * d_model * d_model) // nb + d_model


@pytest.mark.parametrize("bias", [False, True])
def test_gelu_parameters_follow_the_closed_form(bias):
    module = GELUConfig(HIDDEN, bias=bias).build(D, 1)
    count = sum(p.numel() for p in module.parameters())
    assert count == 2 * D * HIDDEN + bias * (HIDDEN + D)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_token_flops_are_torchs_count(config):
    module, counter = drawn(config), FlopCounterMode(display=False)
    with counter:
        module(tokens(7))
    ours = sum(part.token_flops() for part in module.modules() if hasattr(part, "token_flops"))
    assert counter.get_total_flops() == 2 * 7 * ours


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_token_is_mixed_by_itself(config):
    module, x = drawn(config), tokens()
    alone = torch.cat([module(x[:, t : t + 1]) for t in range(5)], dim=1)
    assert torch.allclose(module(x), alone, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_parameter_has_a_gradient_also_under_autocast(config):
    module = drawn(config).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = module(tokens())
    outputs.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_initial_values_are_those_of_the_release():
    d_model, f, nb = 64, 256, 4
    module = drawn(MonarchMLPConfig(f, nb), d_model)
    bound = (d_model // nb) ** -0.5
    assert 0.98 * bound < module.gate_up.weight.abs().max() <= bound
    scaled = (f // nb) ** -0.5 / math.sqrt(RESIDUALS)
    assert 0.98 * scaled < module.down.weight.abs().max() <= scaled
    assert not module.down.bias.any()
    module = drawn(GELUConfig(f), d_model)
    assert module.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert module.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(RESIDUALS), rel=0.03)


def test_all_kinds_are_known_by_name():
    assert set(channel_kinds()) == {"none", "swiglu", "gelu", "monarch_mlp"}
    assert all(kind == config.kind for kind, config in channel_kinds().items())


@pytest.mark.parametrize(("d_hidden", "nb"), [(32, 3), (30, 4), (32, 64)])
def test_blocks_that_do_not_divide_a_width_are_refused(d_hidden, nb):
    for n_factors in (1, 2):
        with pytest.raises(ValueError, match="do not divide a width"):
            MonarchMLPConfig(d_hidden, nb, n_factors).build(D, 1)


def test_sizes_that_mean_nothing_are_refused():
    for make in (
        lambda: GELUConfig(0),
        lambda: MonarchMLPConfig(0),
        lambda: MonarchMLPConfig(32, 0),
        lambda: MonarchMLPConfig(32, 4, 3),
    ):
        with pytest.raises(ValueError, match="take"):
            make()
