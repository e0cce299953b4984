"""Hydra against its matrix, its definition by shifts and flips, and its formulas."""

import math

import numpy as np
import pytest
import torch

from kernels.scans import ssd as kernel
from kernels.scans.ssd import ssd_reference
from models.mixer import Pattern, Slot
from models.mixers.recurrent.hydra import Coefficients, Hydra, HydraConfig
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import ssd as oracle


def small(**fields) -> Hydra:
    mixer = build("hydra", **{"d_state": 3, "head_dim": 8, **fields})
    assert isinstance(mixer, Hydra)
    return mixer


def arrays(mixer: Hydra) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in mixer.named_parameters()}


def coefficients_of(mixer: Hydra, L: int, documents: torch.Tensor) -> Coefficients:
    x = inputs(L, rows=1).double()
    return mixer.project(x, WholeSequence(documents))[1]


def matrix_of(mixer: Hydra, coefficients: Coefficients, documents: torch.Tensor) -> torch.Tensor:
    L, H = documents.shape[1], mixer.n_heads
    units = torch.eye(L).double()[None, :, None].expand(1, L, H, L)
    mixed = mixer.mix(units, coefficients, WholeSequence(documents))
    return mixed[0].permute(1, 0, 2).detach()


def entries_of(mixer: Hydra, coefficients: Coefficients, documents: torch.Tensor) -> np.ndarray:
    dt, B, C, diagonal, _ = (part[0].detach().double().numpy() for part in coefficients)
    A = -np.exp(arrays(mixer)["A_log"])
    return oracle.quasiseparable(dt, A, B, C, diagonal, documents[0].numpy())


@pytest.mark.parametrize("n_groups", [1, 2])
def test_hydra_equals_a_float64_loop(n_groups):
    mixer, x, documents = small(n_groups=n_groups), inputs(23), packed((1, 5, 17))
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    for row in range(2):
        wanted = oracle.hydra(arrays(mixer), x[row].numpy(), documents[row].numpy(), n_groups)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 5e-6


@pytest.mark.parametrize("lengths", [(70,), (1, 30, 2, 37)])
def test_its_matrix_has_the_quasiseparable_entries(lengths):
    mixer, documents = small(n_groups=2).double(), packed(lengths, rows=1)
    with torch.no_grad():
        mixer.A_log.uniform_(-1, 1)
    coefficients = coefficients_of(mixer, 70, documents)
    wanted = entries_of(mixer, coefficients, documents)
    got = matrix_of(mixer, coefficients, documents).numpy()
    assert np.abs(got - wanted).max() < 1e-12 * np.abs(wanted).max()


def test_blocks_off_the_diagonal_have_at_most_the_states_rank():
    mixer, documents = small().double(), packed((40,), rows=1)
    matrix = matrix_of(mixer, coefficients_of(mixer, 40, documents), documents)
    for head in matrix:
        for cut in (4, 20, 33):
            for block in (head[cut:, :cut], head[:cut, cut:]):
                singular = torch.linalg.svdvals(block)
                assert (singular > 1e-10 * singular[0]).sum() == 3
        assert torch.linalg.matrix_rank(head) == 40


def test_it_is_two_shifted_scans_and_a_diagonal():
    mixer, sequence = small().double(), whole(50, rows=1)
    x = inputs(50, rows=1).double()
    values, coefficients = mixer.project(x, sequence)
    dt, B, C, diagonal, _ = coefficients
    A = -torch.exp(mixer.A_log)

    def shifted(y):
        return torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)

    def scanned(way, turn):
        parts = (turn(part) for part in (values, dt[:, :, way], B[:, :, way], C[:, :, way]))
        v, steps, enter, leave = parts
        return shifted(ssd_reference(v, steps, A, enter, leave).outputs)

    forward = scanned(0, lambda part: part)
    backward = scanned(1, lambda part: part.flip(1)).flip(1)
    wanted = forward + backward + diagonal[..., None] * values
    got = mixer.mix(values, coefficients, sequence)
    assert (got - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize("place", [0, 9, 18, 31])
def test_its_matrix_is_sequence_aligned(place):
    first, last, documents = 10, 17, packed((32,), rows=1)
    mixer = small().double()
    before = coefficients_of(mixer, 32, documents)
    generator = torch.Generator().manual_seed(7)
    changed = Coefficients(*(part.detach().clone() for part in before))
    for part in changed:
        part[:, place] += torch.rand(part[:, place].shape, generator=generator).double()
    matrices = [matrix_of(mixer, each, documents) for each in (before, changed)]
    inner = [matrix[:, first : last + 1, first : last + 1] for matrix in matrices]
    assert not torch.allclose(*matrices, rtol=1e-6)
    assert torch.allclose(*inner, rtol=1e-12, atol=1e-14)


def test_tokens_on_both_sides_matter():
    mixer, x, sequence = small(), inputs(20), whole(20)
    for place in (0, 19):
        changed = x.clone()
        changed[:, place] += 1.0
        moved = (mixer(changed, sequence) - mixer(x, sequence)).abs().amax(dim=(0, 2))
        assert torch.all(moved > 0)


def test_reading_backwards_with_the_directions_swapped_gives_the_same():
    mixer, x, documents = small(), inputs(20), packed((7, 13))
    E, GN, H = 32, 3, 4
    swapped = small()
    with torch.no_grad():
        for name in ("in_proj.weight", "conv.weight", "conv.bias"):
            source = mixer.get_parameter(name)
            offset = E if name == "in_proj.weight" else 0
            order = list(range(offset + E))
            order += [offset + E + i for i in (*range(2 * GN, 4 * GN), *range(2 * GN))]
            if offset:
                steps = offset + E + 4 * GN
                order += [steps + i for i in (*range(H, 2 * H), *range(H))]
            moved = source[order]
            swapped.get_parameter(name).copy_(moved.flip(1) if name == "conv.weight" else moved)
    turned = swapped(x.flip(1), WholeSequence(packed((13, 7)))).flip(1)
    wanted = mixer(x, WholeSequence(documents))
    assert (turned - wanted).norm() < 2e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("d_model", "n_groups", "d_state", "d_conv"), [(64, 1, 16, 7), (48, 2, 5, 3)]
)
def test_parameters_of_a_layer_follow_the_formula(d_model, n_groups, d_state, d_conv):
    config = HydraConfig(d_state=d_state, n_groups=n_groups, d_conv=d_conv, head_dim=8)
    mixer = config.build(Slot(d_model, pattern=Pattern.NONCAUSAL_SELF))
    E, GN = 2 * d_model, n_groups * d_state
    H = E // 8
    wanted = d_model * (3 * E + 4 * GN + 2 * H) + (E + 4 * GN) * (d_conv + 1) + 3 * H + H * E + E
    assert sum(p.numel() for p in mixer.parameters()) == wanted


def test_scan_flops_are_two_counted_scans_and_the_diagonal():
    mixer = small()
    products, elementwise = oracle.counted_scan_flops(150, kernel.CHUNK, 4, 8, 1, 3)
    flops = mixer.mix_flops(150, 150)
    assert flops.needed == 2 * products
    assert flops.elementwise == 2 * elementwise + 3 * 32 * 150


def test_initial_values_are_those_of_the_release():
    mixer = small(head_dim=1)
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert torch.all((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001))
    assert torch.all(mixer.A_log == 0)
    assert torch.all(mixer.D == 1)
    assert 0.98 * 32**-0.5 < mixer.fc_D.weight.abs().max() <= 32**-0.5
    bound = 32**-0.5 / math.sqrt(2)
    assert bound * 0.98 < mixer.out_proj.weight.abs().max() <= bound
    assert mixer.no_decay == {"A_log", "D", "dt_bias"}


def test_defaults_are_those_of_the_release():
    mixer = HydraConfig().build(Slot(768, pattern=Pattern.NONCAUSAL_SELF))
    assert mixer.n_heads == 24
    assert mixer.conv.weight.shape == (1536 + 4 * 64, 7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 5}, "head_dim 5 does not divide the inner width 32"),
        ({"head_dim": 8, "d_conv": 4}, "d_conv 4 has no central tap"),
        ({"head_dim": 8, "n_groups": 3}, "n_groups 3 does not divide the 4 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        HydraConfig(**fields).build(Slot(16, pattern=Pattern.NONCAUSAL_SELF))
