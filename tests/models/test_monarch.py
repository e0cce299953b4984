"""M2's sequence mixer against its definition, its published counts, and its limits."""

import numpy as np
import pytest
import torch

from models.channel import GELUConfig, MonarchMLPConfig
from models.mixer import Pattern, Slot
from models.mixers.convolution.monarch import MonarchConfig
from models.parts.filters import FilterConfig, ImplicitFilter, fft_flops
from models.sequences.continued import ContinuedSequence
from models.sequences.positions import PADDING
from models.sequences.whole import WholeSequence
from tests.conformance import numerics, packing
from tests.conformance.case import Case
from tests.models.conftest import D_MODEL, SMALL, build, inputs, packed, whole
from tests.oracles import monarch as oracle

EPS = torch.finfo(torch.float32).eps
BOTH = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF)
M2_BERT = [
    (768, 3072, 80_267_328),
    (960, 3840, 115_583_616),
    (1536, 6144, 259_133_760),
    (1792, 7168, 341_038_144),
]


def drawn_filter(config, channels, directions=1):
    filter = ImplicitFilter(config, channels, directions)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in filter.named_parameters():
            parameter.copy_(filter.draw(name, generator))
    return filter.requires_grad_(False)


def count(module):
    return sum(p.numel() for p in module.parameters())


def stream(mixer, x, pieces):
    state, outputs, begin = None, [], 0
    for n in pieces:
        sequence = ContinuedSequence(torch.zeros(x.shape[0], n, dtype=torch.int32), state)
        sequence.enter_layer()
        outputs.append(mixer(x[:, begin : begin + n], sequence))
        sequence.leave_layer()
        state, begin = sequence.state(), begin + n
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pattern", BOTH)
def test_it_equals_the_released_steps(pattern, residual):
    mixer = build("monarch", pattern=pattern, residual=residual)
    x, documents = inputs(41), packed((6, 35))
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    wanted = [oracle.mixer(weights, row.numpy(), documents[0].numpy(), 64) for row in x]
    got = mixer(x, WholeSequence(documents)).detach().double().numpy()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 2e-6
    exact = mixer.double()(x.double(), WholeSequence(documents)).detach().numpy()
    assert np.linalg.norm(exact - wanted) / np.linalg.norm(wanted) < 1e-12


def test_its_matrix_is_a_gated_toeplitz_one():
    mixer, x = build("monarch", residual=True).double(), inputs(20).double()
    _, (before, after, _) = mixer.project(x, whole(20))
    taps = mixer.filter(20).detach().numpy()
    for row in range(2):
        matrix = mixer.materialize(x, whole(20))[row].detach().numpy()
        for e in range(D_MODEL):
            for t in range(20):
                for s in range(20):
                    tap = taps[e, t - s] if s <= t else 0.0
                    wanted = after[row, t, e] * tap * before[row, s, e]
                    assert abs(matrix[e, t, s] - wanted.item()) < 1e-12


@pytest.mark.parametrize("pattern", BOTH)
def test_its_residual_convolution_keeps_documents_and_padding_apart(pattern):
    config = MonarchConfig(max_len=64, residual=True, filter_hidden=SMALL["filter_hidden"])
    case = Case("monarch", pattern, config)
    for each in (numerics.derivatives, packing.packed_gradients, packing.nan_padding):
        each.check(case)


@pytest.mark.parametrize("amplitude", [1.0, 1e2, 1e4])
def test_later_tokens_leave_no_more_than_the_rounding_of_an_fft(amplitude):
    mixer, x = build("monarch", max_len=200, residual=True), inputs(200)
    loud = x.clone()
    loud[:, 120:] *= amplitude
    with torch.no_grad():
        _, coefficients = mixer.project(x, whole(200))
        louder, changed = mixer.project(loud, whole(200))
        before, after = mixer(x, whole(200)), mixer(loud, whole(200))
    inner = (louder.squeeze(-1) * changed.before).abs().max().item()
    gate = coefficients.after.abs().max().item()
    width = mixer.out_proj.weight.abs().sum(dim=1).max().item()
    reach = max(gate * inner, loud.abs().max().item()) * width
    leak = (after - before)[:, :120].abs().max().item()
    assert leak <= 4 * EPS * mixer.filter_norm() * reach


@pytest.mark.parametrize("residual", [False, True])
def test_decoding_from_a_prompt_equals_the_whole(residual):
    mixer, x = build("monarch", max_len=220, residual=residual), inputs(220)
    with torch.no_grad():
        expected = mixer(x, whole(220))
        for pieces in ((140,) + (1,) * 80, (7, 150, 1, 1, 50, 11)):
            outputs, _ = stream(mixer, x, pieces)
            assert (outputs - expected).norm() / expected.norm() < 2e-6


def test_decoding_keeps_two_numbers_for_each_channel_and_token():
    mixer, x = build("monarch"), inputs(64, rows=1)
    with torch.no_grad():
        for pieces in ((64,), (1,) * 64):
            _, state = stream(mixer, x, pieces)
            taps = 2 * 3 * D_MODEL
            assert state.bytes() == 4 * (2 * 64 * D_MODEL + taps)


def test_window_ends_are_those_of_the_release():
    filter = drawn_filter(FilterConfig(max_len=512), 768)
    last = filter._window(512)[-1]
    assert [f"{share:.2e}" for share in (last[0], last[-1])] == ["4.64e-02", "2.15e-07"]
    assert torch.all(filter._window(512)[0] == 1)


def test_features_are_those_of_the_release_whether_learned_or_not():
    for count_ in (3, 5, 33):
        config = FilterConfig(max_len=200, filter_features=count_, filter_hidden=8)
        fixed = FilterConfig(200, filter_features=count_, filter_hidden=8, trainable_features=False)
        wanted = oracle.features(200, count_)
        assert np.abs(drawn_filter(config, 4).features.numpy() - wanted).max() < 1e-7
        assert np.abs(drawn_filter(fixed, 4)._features(200).numpy() - wanted).max() < 1e-7
        assert count(drawn_filter(config, 4)) - count(drawn_filter(fixed, 4)) == 200 * count_


def test_initial_filters_have_the_size_of_the_releases():
    filter = drawn_filter(FilterConfig(max_len=512), 256)
    taps = filter(512)
    taps[:, 0] -= filter.skip
    rms, first = taps.square().mean().sqrt().item(), taps[:, 0].square().mean().sqrt().item()
    one, two = taps.abs().sum(dim=1).mean().item(), taps.norm(dim=1).mean().item()
    for found, published in ((rms, 0.10), (first, 0.43), (one, 22.0), (two, 2.35)):
        assert published / 2 < found < published * 2


def test_a_shorter_length_has_the_first_of_the_same_taps():
    filter = drawn_filter(FilterConfig(max_len=64), 8, directions=2)
    for direction in (0, 1):
        assert torch.allclose(filter(10, direction), filter(64, direction)[:, :10], atol=1e-7)
    assert filter(100).shape == (8, 64)


def test_autocast_does_not_reach_the_filter():
    filter = drawn_filter(FilterConfig(max_len=64), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(filter(64), filter(64).float())
        inside = filter(64)
    assert torch.equal(inside, filter(64))


def test_bfloat16_weights_still_make_a_float32_filter():
    filter = drawn_filter(FilterConfig(max_len=64), 8).bfloat16()
    assert filter(64).dtype is torch.float32
    neighbours = filter(64)[:, 1:] - filter(64)[:, :-1]
    assert torch.count_nonzero(neighbours) == neighbours.numel()


def test_float32_filters_are_those_of_float64_to_rounding():
    filter = drawn_filter(FilterConfig(max_len=2048), 32)
    single, double = filter(2048).double(), filter.double()(2048)
    assert (single - double).norm() / double.norm() < 1e-6


@pytest.mark.parametrize(("d_model", "d_hidden", "total"), M2_BERT)
def test_published_totals_of_m2_bert(d_model, d_hidden, total):
    D, vocab_size, places = d_model, 30_528, 128
    slot = Slot(D, 1, Pattern.NONCAUSAL_SELF)
    with torch.device("meta"):
        mixer = count(MonarchConfig(max_len=places, residual=True).build(slot))
        channel = count(MonarchMLPConfig(d_hidden).build(D, 1))
    embedding = vocab_size * D + places * D + 2 * D + 2 * D
    head = D * D + D + 2 * D + vocab_size
    assert 12 * (mixer + channel + 2 * D) + embedding + head == total


def test_published_total_of_hyena():
    D, d_hidden, vocab_size = 864, 1728, 50_264
    config = MonarchConfig(max_len=2048, filter_features=33, filter_hidden=64)
    with torch.device("meta"):
        mixer = count(config.build(Slot(D)))
        channel = count(GELUConfig(d_hidden, bias=True).build(D, 1))
    assert 18 * (mixer + channel + 4 * D) + vocab_size * D + 2 * D == 153_700_416


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_parameters_follow_the_closed_form(residual, directions):
    D, E, h, inner, longest = D_MODEL, 5, 12, 3, 50
    config = MonarchConfig(longest, E, h, inner, residual=residual)
    mixer = config.build(Slot(D, 1, BOTH[directions - 1]))
    network = E * h + h + inner * (h * h + h) + h * D
    each = D + E * longest + h + directions * network
    assert count(mixer) == 4 * D * D + 4 * D + 12 * D + (1 + residual) * each


@pytest.mark.parametrize(
    ("length", "flops"), [(1024, 119e3), (2048, 258e3), (8192, 1.20e6), (32768, 5.44e6)]
)
def test_flops_of_a_convolution_are_the_tabled_ones(length, flops):
    assert fft_flops(length) == pytest.approx(flops, rel=0.01)


def test_flops_of_the_mixer_are_ffts_and_one_filter_a_sequence():
    D, E, h, N = 64, 5, 32, 256
    slot = Slot(D, 1, Pattern.NONCAUSAL_SELF)
    mixer = MonarchConfig(N, filter_hidden=h, residual=True).build(slot)
    network = 2 * N * (E * h + 2 * h * h + h * D)
    assert mixer.mix_flops(N, N).needed == 2 * (D * fft_flops(N) + 2 * network)
    maps = 4 * D * D + 3 * 3 * D
    tokens = sum(m.token_flops() for m in mixer.modules() if hasattr(m, "token_flops"))
    assert tokens == 2 * maps


def test_a_token_by_itself_costs_less_than_the_whole_and_more_than_its_share():
    mixer = MonarchConfig(2048, filter_hidden=32).build(Slot(64))
    whole_, token = mixer.mix_flops(2048, 2048).needed, mixer.mix_flops(1, 2048).needed
    assert whole_ / 2048 < token < whole_ / 100


@pytest.mark.parametrize("residual", [False, True])
def test_a_document_longer_than_the_filter_is_refused_before_anything_is_computed(residual):
    mixer = build("monarch", residual=residual)
    mixer.in_proj.register_forward_pre_hook(lambda *_: pytest.fail("it computes"))
    with pytest.raises(
        ValueError, match=r"document of 65 tokens, .* max_len 64 taps; take a larger"
    ):
        mixer(inputs(65), whole(65))
    with pytest.raises(ValueError, match="document of 65 tokens"):
        mixer(inputs(90), WholeSequence(packed((25, 65))))


def test_rows_may_be_longer_than_the_filter_if_their_documents_are_not():
    mixer = build("monarch")
    assert mixer(inputs(120), WholeSequence(packed((60, 60)))).isfinite().all()
    padded = packed((20, 100))
    padded[:, 20:] = PADDING
    assert mixer(inputs(120), WholeSequence(padded)).isfinite().all()


def test_a_filter_ends_decoding_at_its_length():
    mixer = build("monarch", max_len=16)
    with torch.no_grad():
        stream(mixer, inputs(16), (10, 1, 5))
        with pytest.raises(ValueError, match="max_len 16"):
            stream(mixer, inputs(17), (10, 1, 5, 1))


@pytest.mark.parametrize("features", [1, 2, 4])
def test_features_that_are_no_pairs_and_a_lag_are_refused(features):
    with pytest.raises(ValueError, match="odd number, 3 or more"):
        MonarchConfig(64, filter_features=features)


def test_weight_decay_touches_the_dense_maps_of_a_filter_alone():
    mixer = build("monarch", residual=True)
    for filter in (mixer.filter, mixer.residual_filter):
        names = {name for name, p in filter.named_parameters() if p.ndim > 1}
        assert names - filter.no_decay == {"in_weight", "inner_weight", "out_weight"}


def test_bidirectional_filters_start_where_the_release_has_them():
    mixer = build("monarch", pattern=Pattern.NONCAUSAL_SELF).double()
    matrix = mixer.materialize(inputs(9).double(), whole(9))[0].detach()
    _, (before, after, _) = mixer.project(inputs(9).double(), whole(9))
    core = matrix / (after[0].t()[:, :, None] * before[0].t()[:, None, :])
    assert torch.allclose(core[:, 3, 4], mixer.filter(9, 1)[:, 0])
    assert torch.allclose(core[:, 3, 3], mixer.filter(9, 0)[:, 0])
