"""S4D against its recurrence, in closed forms at any length, and its initial values."""

import math

import numpy as np
import pytest
import torch

from models.mixer import Pattern, Slot
from models.mixers.recurrent.s4d import S4DConfig, final_state, impulse_response, run_diagonal
from models.parts.filters import fft_flops
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, build, inputs, packed, whole
from tests.oracles import s4d as oracle

BOTH = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF)


def weights_of(mixer):
    return {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}


@pytest.mark.parametrize("pattern", BOTH)
def test_it_equals_a_float64_recurrence(pattern):
    mixer, x, documents = build("s4d", pattern=pattern), inputs(100), packed((6, 94))
    ids = documents[0].numpy()
    wanted = np.stack([oracle.mixer(weights_of(mixer), row.numpy(), ids) for row in x])
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 2e-6
    exact = mixer.double()(x.double(), WholeSequence(documents)).detach().numpy()
    assert np.linalg.norm(exact - wanted) / np.linalg.norm(wanted) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 63, 65, 1000, 8192])
def test_its_filter_and_final_state_are_closed_forms_at_any_length(length):
    mixer = build("s4d", d_state=4)
    system = mixer.discrete(0)
    rate, out = (x.detach().to(torch.complex128) for x in mixer.double().discrete(0))
    steps = torch.arange(length, dtype=torch.float64)
    decays = torch.exp(rate[:, None] * steps[:, None])
    wanted = 2 * (decays * out[:, None]).sum(dim=2).real
    taps = impulse_response(system, length).detach().double()
    assert (taps - wanted).norm() / wanted.norm() < 2e-6
    x = inputs(length)
    final = torch.einsum("eln,ble->ben", decays.flip(1), x.to(torch.complex128))
    error = final_state(system, x).detach() - final
    assert error.norm() / final.norm() < 2e-6


def test_gradients_go_back_through_the_state():
    mixer = build("s4d").double()
    x = inputs(30).double().requires_grad_()
    leaves = [x, *(p for name, p in mixer.named_parameters() if "out_proj" not in name)]
    weight = torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(0)).double()

    def outputs(pieces):
        state, parts = None, []
        for part in x.split(pieces, dim=1):
            out, state = run_diagonal(part, mixer.discrete(0), mixer.D, state, None)
            parts.append(out)
        return (torch.cat(parts, dim=1) * weight).sum() + state.square().sum()

    wanted = torch.autograd.grad(outputs([30]), leaves)
    found = torch.autograd.grad(outputs([11, 1, 1, 17]), leaves)
    for got, expected in zip(found, wanted, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()


def test_a_document_starts_from_nothing_and_leaves_only_its_own_state():
    mixer, x = build("s4d"), inputs(20)
    system, documents = mixer.discrete(0), packed((7, 13))
    initial = torch.randn(2, D_MODEL, 8, 2, generator=torch.Generator().manual_seed(1))
    outputs, final = run_diagonal(x, system, mixer.D, initial, documents)
    first, _ = run_diagonal(x[:, :7], system, mixer.D, initial, None)
    second, alone = run_diagonal(x[:, 7:], system, mixer.D, None, None)
    assert torch.allclose(outputs, torch.cat([first, second], dim=1), atol=1e-6)
    assert torch.allclose(final, alone, atol=1e-6)


def test_the_decoding_state_has_d_state_float32_numbers_a_channel():
    mixer = build("s4d")
    for length in (1, 40):
        sequence = ContinuedSequence(torch.zeros(2, length, dtype=torch.int32), None)
        sequence.enter_layer()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixer(inputs(length).bfloat16(), sequence)
        sequence.leave_layer()
        (state,) = sequence.state().layers[0]
        assert (state.shape, state.dtype) == ((2, D_MODEL, 8, 2), torch.float32)


def test_its_matrix_is_toeplitz_with_the_skip_on_the_diagonal():
    mixer = build("s4d", pattern=Pattern.NONCAUSAL_SELF).double()
    matrix = mixer.materialize(inputs(12, rows=1).double(), whole(12, rows=1))[0].detach()
    ahead, back = (impulse_response(mixer.discrete(r), 12).detach() for r in (0, 1))
    for t in range(12):
        for s in range(12):
            wanted = ahead[:, t - s] if s <= t else back[:, s - t - 1]
            wanted = wanted + mixer.D.detach() * (s == t)
            assert torch.allclose(matrix[:, t, s], wanted, atol=1e-12)


def test_initial_values_are_those_of_s4d_lin():
    mixer = S4DConfig().build(Slot(4096))
    generator = torch.Generator().manual_seed(0)
    drawn = {name: mixer.draw(name, generator) for name in ("A_log", "A_imag", "log_dt", "C", "D")}
    assert torch.allclose(drawn["A_log"].exp(), torch.full((4096, 8), 0.5))
    assert torch.allclose(drawn["A_imag"][7], math.pi * torch.arange(8.0))
    dt = drawn["log_dt"].exp()
    assert torch.all((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001))
    assert dt.median().item() == pytest.approx(1e-2, rel=0.1)
    assert drawn["C"].square().sum(dim=-1).mean().item() == pytest.approx(1.0, rel=0.02)
    assert drawn["D"].std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("pattern", BOTH)
def test_the_filter_norm_bounds_every_sum_of_taps(pattern):
    mixer = build("s4d", pattern=pattern)
    filters = [impulse_response(mixer.discrete(r), 4000) for r in range(len(mixer.C))]
    exact = (sum(k.abs().sum(dim=1) for k in filters) + mixer.D.abs()).max().item()
    assert exact <= mixer.filter_norm() <= 20 * exact


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("pattern", BOTH)
def test_parameters_follow_the_closed_form(pattern, glu):
    D, N = 24, 10
    mixer = S4DConfig(d_state=N, glu=glu).build(Slot(D, 1, pattern))
    directions = 1 if pattern is Pattern.CAUSAL_SELF else 2
    system = D + D * N + directions * D * N + D
    maps = (1 + glu) * (D * D + D)
    assert sum(p.numel() for p in mixer.parameters()) == system + maps


def test_flops_are_ffts_and_the_filter_or_steps_of_the_recurrence():
    mixer = S4DConfig().build(Slot(64))
    assert mixer.mix_flops(512, 512).needed == 64 * (fft_flops(512) + 4 * 16 * 512)
    step = mixer.mix_flops(1, 512)
    assert (step.needed, step.elementwise) == (0, 64 * 8 * 12)


@pytest.mark.parametrize("d_state", [0, 1, 7])
def test_a_state_that_is_no_pairs_is_refused(d_state):
    with pytest.raises(ValueError, match="take an even number"):
        S4DConfig(d_state=d_state)
