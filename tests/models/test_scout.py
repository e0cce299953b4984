"""SCOUT against a float64 loop over tokens, its limits, and what decoding keeps."""

import numpy as np
import pytest
import torch

from models.backbone import BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig
from models.mixer import Pattern
from models.mixers.softmax.scout import ScoutConfig
from models.mixers.softmax.window import WindowConfig
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.conformance import causality, numerics, packing, streaming, training
from tests.conformance.case import Case
from tests.models.conftest import build, inputs, packed, small_config, whole
from tests.oracles import local_attention as oracle

EVERY = 4
POOLINGS = ("last", "mean", "learned")
DOCUMENTS = torch.cat([packed((6, 31), rows=1), packed((20, 1, 3, 4, 9), rows=1)])
SPLITS = [(37,), (1,) * 37, (10, 1, 1, 25), (9, 9, 19), (3, *[1] * 34)]
NEEDED_OF_POOLED = (
    causality.future_outputs,
    causality.documents_apart,
    numerics.matrix,
    numerics.derivatives,
    numerics.bfloat16,
    packing.packed_outputs,
    packing.packed_gradients,
    packing.nan_padding,
    streaming.state_bytes,
    training.every_parameter,
    training.meta_device,
)


def weights_of(mixer):
    return {name: p.detach().numpy() for name, p in mixer.named_parameters()}


def decode(mixer, x, documents, pieces):
    """Outputs of rows given in pieces, and the states after each."""
    state, outputs, states, begin = None, [], [], 0
    for n in pieces:
        ids = documents[:, begin : begin + n]
        before = documents[:, begin - 1 : begin] if begin else torch.zeros_like(ids[:, :1])
        sequence = ContinuedSequence(ids - before, state)
        sequence.enter_layer()
        with torch.no_grad():
            outputs.append(mixer(x[:, begin : begin + n], sequence))
        sequence.leave_layer()
        state, begin = sequence.state(), begin + n
        states.append(state)
    return torch.cat(outputs, dim=1), states


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("heads", "groups", "qk_norm"), [(4, 4, False), (4, 2, True)])
def test_scout_equals_a_float64_loop_over_tokens(heads, groups, qk_norm, pooling):
    mixer = build("scout", n_heads=heads, n_kv_heads=groups, qk_norm=qk_norm, pooling=pooling)
    x, sizes = inputs(37), (heads, groups, EVERY)
    got = mixer(x, WholeSequence(DOCUMENTS)).detach().double().numpy()
    for row, ids in enumerate(DOCUMENTS.numpy()):
        wanted = oracle.scout_mixer(weights_of(mixer), x[row].numpy(), ids, sizes, pooling)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 2e-6


@pytest.mark.parametrize("pooling", POOLINGS)
def test_segments_of_one_token_are_a_transformers_attention(pooling):
    attention = build("attention", seed=3, qk_norm=False, rope_theta=1e6)
    mixer = build("scout", every=1, pooling=pooling)
    mixer.load_state_dict(attention.state_dict(), strict=pooling != "learned")
    x = inputs(37).requires_grad_()
    found, wanted = (m(x, WholeSequence(DOCUMENTS)) for m in (mixer, attention))
    assert (found - wanted).norm() / wanted.norm() < 1e-6
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted))
    actual, expected = gradients
    assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_row_of_the_matrix_has_the_own_key_once_and_the_ends_of_earlier_segments(every):
    matrix = build("scout", every=every).materialize(inputs(37), whole(37))
    mask = torch.from_numpy(oracle.checkpointed(np.zeros((1, 37), dtype=int), every))
    assert torch.equal(matrix > 0, mask[:, None].expand_as(matrix))
    assert torch.allclose(matrix.sum(dim=-1), torch.ones(()), atol=1e-6)
    assert torch.equal(mask[0].sum(dim=-1), torch.arange(37) // every + 1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_before_a_whole_segment_the_output_is_the_own_value(pooling):
    mixer, x = build("scout", every=37, pooling=pooling), inputs(37)
    value = mixer.qkv(x)[..., -16:]
    assert torch.equal(mixer(x, whole(37)), mixer.out(value))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pieces", SPLITS, ids=lambda pieces: f"{len(pieces)} pieces")
def test_any_split_of_rows_with_other_documents_equals_the_whole(pieces, pooling):
    mixer, x = build("scout", pooling=pooling), inputs(37)
    for documents in (DOCUMENTS, torch.zeros_like(DOCUMENTS)):
        wanted = mixer(x, WholeSequence(documents))
        got, _ = decode(mixer, x, documents, pieces)
        assert (got - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize("each", NEEDED_OF_POOLED, ids=lambda each: each.name)
@pytest.mark.parametrize("pooling", ["mean", "learned"])
def test_pooled_segments_have_the_properties_of_published_ones(pooling, each):
    each.check(Case("scout", Pattern.CAUSAL_SELF, small_config("scout", pooling=pooling)))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_decoding_keeps_a_key_and_value_for_each_segment_and_the_unfinished_one_if_pooled(pooling):
    mixer, x = build("scout", pooling=pooling, n_heads=4, n_kv_heads=2), inputs(43)
    pieces = (1, 1, 1, 1, 20, *[1] * 19)
    _, states = decode(mixer, x, torch.zeros(2, 43, dtype=torch.int32), pieces)
    unfinished = 0 if pooling == "last" else EVERY - 1
    for tokens, state in zip(np.cumsum(pieces).tolist(), states, strict=True):
        numbers = 2 * 2 * 4 * (tokens // EVERY + unfinished)
        assert state.bytes() == 2 * numbers * 4
        assert sum(x.untyped_storage().nbytes() for x in state.layers[0]) == state.bytes()


@pytest.mark.parametrize("training", [True, False])
def test_scout_on_a_window_mixer_does_not_see_later_tokens(training):
    blocks = {
        "w": BlockConfig(WindowConfig(n_heads=2, window=5, initial_std=0.3), NoChannelConfig()),
        "s": BlockConfig(ScoutConfig(n_heads=2, every=4, initial_std=0.3), NoChannelConfig()),
    }
    config = BackboneConfig(blocks, "w s", n_layers=4, d_model=16, vocab_size=50)
    backbone = build_backbone(config, seed=1).train(training)
    tokens = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(0))
    before = backbone(tokens, WholeSequence(DOCUMENTS))
    for place in (1, 20, 36):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 17) % 50
        after = backbone(changed, WholeSequence(DOCUMENTS))
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("every", [1, 4, 7, 64])
@pytest.mark.parametrize("length", [1, 6, 7, 40])
def test_needed_flops_equal_an_enumeration_of_visible_pairs(length, every):
    flops = build("scout", n_heads=4, every=every).mix_flops(length, length)
    mask = oracle.checkpointed(np.zeros((1, length), dtype=int), every)
    S = length // every
    assert flops.needed == 4 * 16 * mask.sum()
    assert mask.sum() == length * (1 + (every * S * (S - 1) / 2 + length % every * S) / length)
    assert flops.full_square == 4 * 16 * length * (S + 1)


def test_flops_of_the_last_queries_are_what_they_add():
    mixer = build("scout")
    together, first = mixer.mix_flops(40, 40).needed, mixer.mix_flops(33, 33).needed
    assert mixer.mix_flops(7, 40).needed == together - first


def test_pooling_costs_what_its_sums_do():
    last, mean, learned = (build("scout", pooling=p).mix_flops(40, 40) for p in POOLINGS)
    # Sums of keys and of values; products of keys with the learned query.
    assert mean.needed - last.needed == 2 * 40 * (16 + 16)
    assert learned.needed - last.needed == 2 * 40 * (16 + 16 + 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "every 0 is not positive; take 1 token or more"),
        ({"n_kv_heads": 3}, "n_kv_heads 3 does not divide n_heads 4; choose a divisor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ScoutConfig(n_heads=4, **fields)
