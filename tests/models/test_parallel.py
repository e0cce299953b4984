"""Parallel mixers against their mixers one by one."""

import math

import pytest
import torch

from models.accounting import account
from models.backbone import BackboneConfig, BlockConfig, build_backbone, undecayed
from models.channel import NoChannelConfig
from models.mixer import Mixer, MixerConfig, Pattern, Slot
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.composed.parallel import Parallel, ParallelConfig
from models.mixers.identity import IdentityConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.whole import WholeSequence
from tests.conformance import causality, numerics, packing, streaming, training
from tests.conformance.case import Case
from tests.models.conftest import D_MODEL, drawn, inputs, packed
from trainer.schema import ConfigError, dump, load

SLOT = Slot(D_MODEL, 2, Pattern.CAUSAL_SELF)
MIXERS = {
    "attention": AttentionConfig(n_heads=4, n_kv_heads=2, initial_std=0.3),
    "mamba": MambaConfig(d_state=4),
    "hybrid": HybridConfig(n_heads=2, window=5, initial_std=0.3),
}
ESSENTIAL = (
    numerics.matrix,
    causality.triangle,
    streaming.any_split,
    packing.packed_outputs,
    packing.packed_gradients,
    training.every_parameter,
    training.meta_device,
)


def make(merge: str = "mean", mixers: dict[str, MixerConfig] = MIXERS) -> Mixer:
    return drawn(ParallelConfig(mixers, merge).build(SLOT), 0)


def case(merge: str) -> Case:
    return Case("parallel", SLOT.pattern, ParallelConfig(MIXERS, merge))


def backbone_config(mixer: MixerConfig) -> BackboneConfig:
    block = BlockConfig(mixer, NoChannelConfig())
    return BackboneConfig({"p": block}, "p", n_layers=3, d_model=64, vocab_size=257)


def test_mixers_of_different_shapes_have_the_essential_properties_of_every_mixer_together():
    together = case("learned")
    for each in ESSENTIAL:
        each.check(together)


def test_the_mean_is_that_of_the_mixers_outputs():
    parallel, sequence = make().double(), WholeSequence(packed((5, 20, 12)))
    x = inputs(37).double()
    wanted = sum(mixer(x, sequence) for mixer in parallel.mixers.values()) / 3
    got = parallel(x, sequence)
    assert (got - wanted).norm() < 1e-14 * wanted.norm()


def test_learned_weights_are_those_of_normalised_outputs():
    parallel, sequence = make("learned").double(), WholeSequence(packed((5, 20, 12)))
    x = inputs(37).double()
    with torch.no_grad():
        parallel.weights.normal_(generator=torch.Generator().manual_seed(2))
    wanted = torch.zeros_like(x)
    for weights, mixer in zip(parallel.weights, parallel.mixers.values(), strict=True):
        output = mixer(x, sequence)
        size = (output.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        wanted += weights * output / size
    assert (parallel(x, sequence) - wanted).norm() < 1e-14 * wanted.norm()


def test_its_matrix_has_those_of_the_mixers_along_the_diagonal():
    parallel, sequence = make().double(), WholeSequence(packed((5, 9)))
    x = inputs(14).double()
    matrix, begin = parallel.materialize(x, sequence), 0
    for name, channels in (("attention", 4), ("mamba", 1), ("hybrid", 1)):
        mixer = parallel.mixers[name]
        values, _ = mixer.project(x, sequence)
        own = mixer.materialize(x, sequence).unflatten(1, (values.shape[2], -1))
        # Attention's two matrices for each pair of values stand at each of a head's channels.
        own = own.repeat_interleave(2 // own.shape[2], dim=2)
        wanted = own.repeat_interleave(channels, dim=1).flatten(1, 2)
        assert torch.equal(matrix[:, begin : begin + wanted.shape[1]], wanted)
        begin += wanted.shape[1]
    assert begin == matrix.shape[1]


def test_the_decoding_state_is_that_of_the_mixers_together():
    parallel, batch = make(), case("mean").batch(((24,), (24,)))
    _, state = streaming.stream(parallel, batch, (10, 1, 13))
    apart = [streaming.stream(mixer, batch, (10, 1, 13))[1] for mixer in parallel.mixers.values()]
    assert state is not None
    assert state.bytes() == sum(own.bytes() for own in apart if own is not None)


def test_flops_are_those_of_the_mixers_together():
    parallel = make()
    each = [mixer.mix_flops(7, 9) for mixer in parallel.mixers.values()]
    for name in ("needed", "full_square", "elementwise"):
        assert getattr(parallel.mix_flops(7, 9), name) == sum(getattr(f, name) for f in each)


def test_what_its_mixers_declare_it_declares():
    attends = make(mixers={"a": MIXERS["attention"]})
    recurs = make("learned", {"h": MIXERS["hybrid"], "h2": MIXERS["hybrid"]})
    assert isinstance(recurs, Parallel)
    assert recurs.constant_state
    assert recurs.no_decay == {"weights"}
    assert not any((attends.constant_state, attends.no_decay, attends.uses_fft))
    assert attends.approximate == ""


def test_learned_weights_start_at_the_residual_scale_and_do_not_decay():
    config = ParallelConfig({"i": IdentityConfig(), "m": MambaConfig()}, "learned")
    backbone = build_backbone(backbone_config(config), seed=1)
    mixer = backbone.layers[0].mixer
    assert torch.allclose(mixer.weights, torch.tensor(1 / math.sqrt(3) / 2))
    assert "layers.0.mixer.weights" in undecayed(backbone)
    assert mixer.mixers["i"].out.weight.abs().max() > 0.95 / 8
    mean = build_backbone(backbone_config(ParallelConfig(config.mixers)), seed=1)
    scaled = mean.layers[0].mixer.mixers["i"].out.weight
    assert torch.allclose(scaled * math.sqrt(3), mixer.mixers["i"].out.weight)


def test_a_mixer_that_does_not_serve_the_pattern_is_named():
    config = ParallelConfig({"a": AttentionConfig(n_heads=2), "m": MambaConfig()})
    with pytest.raises(
        ValueError, match=r"mixers\.m: mixer mamba is used in the pattern noncausal_self"
    ):
        config.build(Slot(D_MODEL, 2, Pattern.NONCAUSAL_SELF))


def test_a_mixer_whose_sizes_do_not_fit_is_named():
    with pytest.raises(ValueError, match=r"mixers\.a: mixer\.n_heads 3 does not divide"):
        ParallelConfig({"a": AttentionConfig(n_heads=3)}).build(SLOT)


def test_a_mixer_that_is_not_linear_is_refused(monkeypatch):
    monkeypatch.setattr("models.mixers.identity.Identity.linear", False)
    with pytest.raises(ValueError, match=r"mixers\.i: identity is not linear in its values"):
        ParallelConfig({"i": IdentityConfig()}).build(SLOT)


@pytest.mark.parametrize("name", ["a.b", "keys", "training", ""])
def test_words_that_cannot_name_a_module_are_refused(name):
    with pytest.raises(ValueError, match=r"is not a valid name .*; take another identifier"):
        ParallelConfig({name: MambaConfig()})
    with pytest.raises(ValueError, match="mixers is empty; name one mixer or more"):
        ParallelConfig({})


def test_plain_data_becomes_a_config_and_back():
    plain = {
        "kind": "parallel",
        "mixers": {"h": {"kind": "hybrid", "n_heads": 2, "window": 8}, "m": {"kind": "mamba"}},
        "merge": "learned",
    }
    config = load(MixerConfig, plain, "mixer")
    assert config == ParallelConfig({"h": HybridConfig(2, 8), "m": MambaConfig()}, "learned")
    assert load(MixerConfig, dump(config), "mixer") == config
    plain["mixers"]["m"]["d_stat"] = 4
    with pytest.raises(ConfigError, match=r"mixer\.mixers\.m\.d_stat; did you mean 'd_state'"):
        load(MixerConfig, plain, "mixer")


def test_accounting_counts_the_mixers():
    config = ParallelConfig({"i": IdentityConfig(), "m": MambaConfig()})
    apart = [account(backbone_config(mixer), 16) for mixer in config.mixers.values()]
    together, norms = account(backbone_config(config), 16), 64 + 3 * 64
    outside = 257 * 64 + norms
    counts = [counted.total_parameters - outside for counted in apart]
    assert together.total_parameters == outside + sum(counts)
    assert together.state_bytes == sum(counted.state_bytes for counted in apart)
