"""The hybrid against float64 loops, its limits, its initial scales, and its window's edges."""

import numpy as np
import pytest
import torch

from models.accounting import account, total_parameters
from models.backbone import BackboneConfig, BlockConfig, build_backbone, undecayed
from models.channel import NoChannelConfig
from models.mixer import Mixer, MixerConfig, Pattern, Slot
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.conformance import causality, numerics, packing, streaming, training
from tests.conformance.case import Case
from tests.models.conftest import D_MODEL, build, drawn, inputs, packed, small_config, whole
from tests.oracles import gated_recurrence as oracle

MODES, WINDOWS, LENGTH = ("rglru", "mingru"), (1, 2, 6, 29, 64), 29
ESSENTIAL = (
    numerics.matrix,
    causality.triangle,
    streaming.any_split,
    packing.packed_outputs,
    packing.packed_gradients,
    training.every_parameter,
    training.meta_device,
)


def ordinary(**fields: object) -> Mixer:
    """A hybrid whose biases, gains and Lambda are not those of the start, in float64."""
    mixer, generator = build("hybrid", **fields), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixer.double()


def alone(hybrid: Mixer, **fields: object) -> Mixer:
    """A hybrid of other fields with the weights of one of both branches."""
    other = build("hybrid", **fields).double()
    own = {name: p for name, p in hybrid.state_dict().items() if name in other.state_dict()}
    if fields.get("branches") == "recurrence":
        own["qkv.weight"] = own["qkv.weight"][D_MODEL:]
    other.load_state_dict(own, strict=True)
    return other


def share_of_window(mixer: Mixer, bias: float) -> None:
    with torch.no_grad():
        mixer.alpha.weight.zero_()
        mixer.alpha_bias.fill_(bias)


def backbone_config(mixer: MixerConfig, d_model: int = 64, n_layers: int = 4) -> BackboneConfig:
    block = BlockConfig(mixer, NoChannelConfig())
    return BackboneConfig({"h": block}, "h", n_layers=n_layers, d_model=d_model, vocab_size=257)


def in_pieces(mixer: Mixer, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        sequence = ContinuedSequence(torch.zeros(piece.shape[:2], dtype=torch.int32), state)
        sequence.enter_layer()
        outputs.append(mixer(piece, sequence))
        sequence.leave_layer()
        state = sequence.state()
    return torch.cat(outputs, dim=1)


def exactly_turned(sequence: WholeSequence, first: int = 0) -> WholeSequence:
    """The sequence with angles in float64, the positions of each row counted from `first`."""
    P = D_MODEL // 2
    positions = torch.arange(first, first + sequence.documents.shape[1], dtype=torch.float64)
    frequencies = 1e4 ** (-2.0 * torch.arange(P // 2, dtype=torch.float64) / P)
    angles = (positions[:, None] * frequencies).repeat(1, 2)[None, :, None]
    made = sequence.memo(("rotation", P, 1e4), lambda: torch.stack([angles.cos(), angles.sin()]))
    assert made.dtype is torch.float64
    return sequence


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_it_equals_a_float64_loop(mode, window):
    mixer = ordinary(mode=mode, window=window)
    x, documents = inputs(LENGTH, rows=1).double(), packed((6, 1, 22), rows=1)
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    got = mixer(x, exactly_turned(WholeSequence(documents)))[0].detach().numpy()
    wanted = oracle.hybrid(weights, x[0].numpy(), documents[0].numpy(), 2, window, mode)
    assert np.linalg.norm(got - wanted) < 1e-12 * np.linalg.norm(wanted)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mode", MODES)
def test_decoding_in_any_pieces_equals_one_shot(mode, window):
    mixer, x = ordinary(mode=mode, window=window), inputs(LENGTH).double()
    expected = mixer(x, whole(LENGTH))
    for pieces in ([1] * LENGTH, [5, 1, 1, 22], [3] + [1] * 26, [14, 15], [2, 27]):
        assert relative(in_pieces(mixer, x, pieces), expected) < 1e-12


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_full_window_begins_to_forget_at_its_length(extra):
    mixer, length = ordinary(window=6), 6 + extra
    x = inputs(length).double()
    got = in_pieces(mixer, x, [1] * length)
    assert relative(got, mixer(x, whole(length))) < 1e-12
    matrix = mixer.materialize(x, whole(length))[:, 0::2]
    assert (matrix[:, :, -1, 0] == 0).all() == (length > 6)


@pytest.mark.parametrize("mode", MODES)
def test_a_wide_window_alone_is_full_attention(mode):
    mixer = ordinary(mode=mode, window=LENGTH, branch_norms=False)
    share_of_window(mixer, 1e4)
    attention = AttentionConfig(n_heads=2, qk_norm=False).build(Slot(D_MODEL)).double()
    attention.load_state_dict({n: mixer.state_dict()[n] for n in attention.state_dict()})
    x, sequence = inputs(LENGTH).double(), WholeSequence(packed((6, 1, 22)))
    assert relative(mixer(x, sequence), attention(x, sequence)) < 1e-12


@pytest.mark.parametrize(("branches", "bias"), [("window", 1e4), ("recurrence", -1e4)])
@pytest.mark.parametrize("norms", [True, False])
def test_a_share_of_one_or_none_is_one_branch_alone(branches, bias, norms):
    mixer = ordinary(branch_norms=norms)
    share_of_window(mixer, bias)
    if norms and branches == "recurrence":
        mixer.norms[0].load_state_dict(mixer.norms[1].state_dict())
    single = alone(mixer, branches=branches, branch_norms=norms)
    x, sequence = inputs(LENGTH).double(), WholeSequence(packed((6, 1, 22)))
    assert relative(mixer(x, sequence), single(x, sequence)) < 1e-12


def test_a_branch_alone_has_no_parameters_of_the_other():
    names = {
        branches: {
            name.partition(".")[0] for name, _ in ordinary(branches=branches).named_parameters()
        }
        for branches in ("window", "recurrence")
    }
    assert names["window"] == {"qkv", "norms", "out"}
    assert names["recurrence"] == {"qkv", "norms", "out", "conv", "gates", "candidate"}


@pytest.mark.parametrize("mode", MODES)
def test_its_matrices_are_those_of_window_and_recurrence_in_turn(mode):
    mixer = ordinary(mode=mode, window=4)
    x, documents = inputs(14, rows=1).double(), packed((5, 9), rows=1)
    sequence = WholeSequence(documents)
    _, coefficients = mixer.project(x, sequence)
    matrix = mixer.materialize(x, sequence)[0].detach().numpy()
    log_decay, write = (part[0].detach().numpy() for part in coefficients.steps)
    wanted = oracle.matrix(np.exp(log_decay), write, documents[0].numpy())
    assert np.abs(matrix[1::2] - wanted).max() < 1e-12 * np.abs(wanted).max()
    windows = matrix[0::2].reshape(2, D_MODEL // 2, 14, 14)
    assert np.abs(windows.sum(axis=-1) - 1).max() < 1e-12
    assert (np.count_nonzero(windows[0, 0], axis=-1) == [1, 2, 3, 4, 4] + [1, 2, 3] + [4] * 6).all()
    assert (windows == windows[:, :1]).all()


def test_positions_counted_from_elsewhere_change_nothing():
    mixer, x = ordinary(), inputs(LENGTH, rows=1).double()
    here, there = (
        mixer(x, exactly_turned(WholeSequence(packed((LENGTH,), rows=1)), first))
        for first in (0, 1000)
    )
    assert relative(there, here) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_the_first_token_of_a_document_writes_its_gated_value(mode):
    mixer = ordinary(mode=mode)
    x, sequence = inputs(12).double(), WholeSequence(packed((7, 5)))
    values, coefficients = mixer.project(x, sequence)
    state = mixer.mix(values, coefficients, sequence)[:, :, 1::2, 0]
    u = mixer.conv(mixer.qkv(x)[..., D_MODEL : 2 * D_MODEL], sequence)
    gate = mixer.gates.input_gate if mode == "rglru" else mixer.gates.update_gate
    wanted = torch.sigmoid(gate(u)) * torch.tanh(mixer.candidate(u)) * values[..., 0]
    for first in (0, 7):
        assert relative(state[:, first], wanted[:, first]) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_special_parameters_keep_their_values_in_a_whole_model(mode):
    backbone = build_backbone(backbone_config(HybridConfig(4, 8, mode), d_model=256), seed=1)
    for layer in backbone.layers:
        mixer = layer.mixer
        assert torch.all(mixer.alpha_bias == 1.0)
        if mode == "rglru":
            decay = torch.exp(-8 * torch.nn.functional.softplus(mixer.gates.Lambda))
            assert 0.9 - 1e-6 < decay.min() < 0.905
            assert 0.995 < decay.max() < 0.999 + 1e-6
        for name, parameter in mixer.named_parameters():
            if name.endswith("bias") and name != "alpha_bias":
                assert torch.all(parameter == 0), name
        assert all(torch.all(norm.weight == 1) for norm in mixer.norms)
        assert mixer.conv.weight.std().item() == pytest.approx(0.5, rel=0.06)
        assert mixer.candidate.weight.std().item() == pytest.approx(64**-0.5, rel=0.03)
        assert mixer.alpha.weight.std().item() == pytest.approx(0.02, rel=0.06)
        assert mixer.out.weight.std().item() == pytest.approx(0.02 / 2, rel=0.02)


def test_gains_biases_and_lambda_are_not_decayed():
    backbone = build_backbone(backbone_config(HybridConfig(4, 8)), seed=1)
    matrices = {"qkv.weight", "out.weight", "alpha.weight", "conv.weight", "candidate.weight"}
    decayed = {
        name.partition(".mixer.")[2]
        for name, _ in backbone.named_parameters()
        if ".mixer." in name and name not in undecayed(backbone)
    }
    assert decayed == matrices | {"gates.recurrence_gate.weight", "gates.input_gate.weight"}


def test_initial_scales_are_those_that_the_card_measured():
    mixer = drawn(HybridConfig(16, 256).build(Slot(1024)), 0)
    x = torch.randn(1, 1024, 1024, generator=torch.Generator().manual_seed(1))
    sequence = whole(1024, rows=1)
    with torch.no_grad():
        values, coefficients = mixer.project(x, sequence)
        u = mixer.conv(mixer.qkv(x)[..., 1024:2048], sequence)
        mixed = mixer.mix(values, coefficients, sequence)[:, 512:, :, 0]
    scales = [
        part.square().mean().sqrt().item() for part in (u, mixed[..., 0::2], mixed[..., 1::2])
    ]
    assert scales == pytest.approx([0.647, 0.043, 0.164], rel=0.04)
    places = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
    quantiles = torch.quantile(coefficients.steps.log_decay[0, ::16].exp().flatten(), places)
    assert quantiles.tolist() == pytest.approx([0.931, 0.963, 0.977, 0.989, 0.999], abs=0.003)


@pytest.mark.parametrize(
    ("d_model", "n_heads", "more"), [(1024, 16, 0.224e6), (1536, 16, 0.484e6), (2048, 32, 0.481e6)]
)
def test_it_has_as_many_parameters_more_than_attention_as_the_card_says(d_model, n_heads, more):
    configs = HybridConfig(n_heads, 256), AttentionConfig(n_heads, qk_norm=False)
    hybrid, attention = (total_parameters(backbone_config(c, d_model, 1)) for c in configs)
    E, H, P = d_model, n_heads, d_model // n_heads
    assert hybrid - attention == 3 * E * P + (4 + 1 + 3 + 1 + 2) * E + (E + 1) * H
    assert hybrid - attention == pytest.approx(more, rel=0.01)


def test_decoding_state_is_window_convolution_and_recurrence_at_any_length():
    config = backbone_config(HybridConfig(4, 8), n_layers=3)
    held = {account(config, length).state_bytes for length in (4, 16, 512)}
    assert held == {3 * 4 * 64 * (2 * 7 + 3 + 1)}


@pytest.mark.parametrize(("queries", "keys"), [(29, 29), (1, 29), (5, 9), (3, 3)])
@pytest.mark.parametrize("window", WINDOWS)
def test_flops_equal_a_count_of_pairs_and_of_steps(queries, keys, window):
    flops = HybridConfig(2, window).build(Slot(16)).mix_flops(queries, keys)
    assert flops.needed == 4 * 16 * oracle.visible_pairs(queries, keys, window)
    assert flops.full_square == 4 * 16 * queries * keys
    assert flops.elementwise == oracle.counted_recurrence_flops(queries, 16)
    if queries == keys and window <= keys:
        assert flops.needed == 4 * 16 * keys * (window - window * (window - 1) / (2 * keys))


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "mingru", "branch_norms": False, "window": 1},
        {"branches": "window"},
        {"branches": "recurrence"},
    ],
    ids=str,
)
def test_other_forms_have_the_essential_properties_of_every_mixer(fields):
    case = Case("hybrid", Pattern.CAUSAL_SELF, small_config("hybrid", **fields))
    for each in ESSENTIAL:
        each.check(case)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"n_heads 3 .* d_model 16 .* choose from 1, 2, 4, 8"):
        HybridConfig(3, 8).build(Slot(16))
    with pytest.raises(ValueError, match="window 0 is not positive; take 1 or more"):
        HybridConfig(2, 0)
