"""The window mixer against float64 masks, a Transformer's weights, and what decoding keeps."""

import numpy as np
import pytest
import torch

from models.mixer import Pattern
from models.mixers.softmax.window import WindowConfig
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import local_attention as oracle

WINDOW = 5
FORMS = [(Pattern.CAUSAL_SELF, 0), (Pattern.NONCAUSAL_SELF, WINDOW - 1)]
DOCUMENTS = torch.cat([packed((6, 17), rows=1), packed((20, 1, 2), rows=1)])


def weights_of(mixer):
    return {name: p.detach().numpy() for name, p in mixer.named_parameters()}


def decode(mixer, x, pieces):
    """Outputs of one document a row given in pieces, and the states after each."""
    state, outputs, states, begin = None, [], [], 0
    for n in pieces:
        sequence = ContinuedSequence(torch.zeros(len(x), n, dtype=torch.int32), state)
        sequence.enter_layer()
        with torch.no_grad():
            outputs.append(mixer(x[:, begin : begin + n], sequence))
        sequence.leave_layer()
        state, begin = sequence.state(), begin + n
        states.append(state)
    return torch.cat(outputs, dim=1), states


@pytest.mark.parametrize(("pattern", "after"), FORMS)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_window_equals_a_float64_mask(groups, pattern, after):
    mixer, x = build("window", pattern=pattern, n_heads=4, n_kv_heads=groups), inputs(23)
    got = mixer(x, WholeSequence(DOCUMENTS)).detach().double().numpy()
    for row, ids in enumerate(DOCUMENTS.numpy()):
        sizes = (4, groups, WINDOW - 1, after)
        wanted = oracle.window_mixer(weights_of(mixer), x[row].numpy(), ids, sizes)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 2e-6


@pytest.mark.parametrize("pattern", [Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF])
def test_weights_of_a_transformer_load_and_mean_the_same_within_the_window(pattern):
    attention, x = build("attention", seed=3, pattern=pattern, n_kv_heads=1), inputs(23)
    mixer = build("window", pattern=pattern, n_kv_heads=1, window=23)
    mixer.load_state_dict(attention.state_dict(), strict=True)
    wanted = attention(x, WholeSequence(DOCUMENTS))
    assert (mixer(x, WholeSequence(DOCUMENTS)) - wanted).norm() / wanted.norm() < 1e-6


def test_causal_queries_see_the_window_and_no_key_more():
    matrix = build("window").materialize(inputs(23), whole(23))
    seen = (matrix > 0).sum(dim=-1)
    assert torch.equal(seen, torch.arange(1, 24).clamp(max=WINDOW).expand_as(seen))


def test_queries_of_the_non_causal_form_see_4_keys_on_either_side():
    matrix = build("window", pattern=Pattern.NONCAUSAL_SELF).materialize(inputs(23), whole(23))
    distance = torch.arange(23)[:, None] - torch.arange(23)
    assert torch.equal(matrix > 0, (distance.abs() < WINDOW).expand_as(matrix))


@pytest.mark.parametrize("prompt", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_decoding_goes_on_where_the_ring_wraps_around(prompt):
    mixer, x = build("window"), inputs(23)
    wanted = mixer(x, whole(23))
    for pieces in ((prompt, *[1] * (23 - prompt)), (prompt, 23 - prompt)):
        got, _ = decode(mixer, x, pieces)
        assert (got - wanted).norm() / wanted.norm() < 1e-6


def test_decoding_keeps_one_key_and_value_less_than_the_window_at_any_length():
    mixer = build("window", n_heads=4, n_kv_heads=2)
    _, states = decode(mixer, inputs(40), (1, 2, 30, *[1] * 7))
    numbers = 2 * (WINDOW - 1) * 2 * 4
    assert {state.bytes() for state in states} == {2 * numbers * 4}
    for state in states:
        assert sum(x.untyped_storage().nbytes() for x in state.layers[0]) == state.bytes()


@pytest.mark.parametrize(("pattern", "after"), FORMS)
@pytest.mark.parametrize("length", [1, 4, 5, 6, 40])
def test_needed_flops_equal_an_enumeration_of_visible_pairs(length, pattern, after):
    mixer = build("window", pattern=pattern, n_heads=4)
    mask = oracle.near(length, np.zeros((1, length), dtype=int), WINDOW - 1, after)
    flops = mixer.mix_flops(length, length)
    assert flops.needed == 4 * 16 * mask.sum()
    assert flops.full_square == 4 * 16 * length * min(length, WINDOW + after)


def test_flops_of_the_last_queries_are_what_they_add():
    mixer = build("window")
    together, first = mixer.mix_flops(40, 40).needed, mixer.mix_flops(33, 33).needed
    assert mixer.mix_flops(7, 40).needed == together - first


def test_mean_visible_keys_are_those_of_the_closed_form():
    mixer, T, W = build("window", window=64), 1000, 64
    mean = mixer.mix_flops(T, T).needed / (4 * 16 * T)
    assert mean == pytest.approx(W - W * (W - 1) / (2 * T), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window 0 is empty; take 1 or more"),
        ({"window": 4, "n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4"),
        ({"window": 4, "n_kv_heads": 0}, "n_kv_heads 0 does not divide n_heads 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WindowConfig(n_heads=4, **fields)
