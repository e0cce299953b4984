"""The backbone as a whole: initial weights, splits, accounting."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.accounting import account, dense_flops_per_token, mix_flops
from models.backbone import Backbone, BackboneConfig, BlockConfig, build_backbone, undecayed
from models.channel import NoChannelConfig, SwiGLUConfig
from models.layers import ShortConv
from models.mixer import Slot
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequence import WholeSequence
from tests.models.conftest import packed

ATTENTION = BlockConfig(AttentionConfig(n_heads=4), SwiGLUConfig(d_hidden=64))
MAMBA = BlockConfig(MambaConfig(), NoChannelConfig())


def mixed(d_model: int = 32, pattern: str = "m a m", n_layers: int = 3) -> BackboneConfig:
    return BackboneConfig(
        blocks={"a": ATTENTION, "m": MAMBA},
        pattern=pattern,
        n_layers=n_layers,
        d_model=d_model,
        vocab_size=257,
    )


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (build_backbone(mixed(), seed) for seed in (1, 1, 2))
    deeper = build_backbone(mixed(n_layers=6), 1)
    names = dict(deeper.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(same.named_parameters())[name])
        if "in_proj" in name or "qkv" in name:
            assert torch.equal(parameter, names[name])
            assert not torch.equal(parameter, dict(other.named_parameters())[name])


def test_transformer_weights_start_as_the_card_says() -> None:
    backbone = build_backbone(mixed(d_model=64, pattern="a", n_layers=4), 1)
    layer = backbone.layers[0]
    assert layer.mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mixer.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert layer.channel.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    backbone = build_backbone(mixed(), 1)
    tokens = torch.randint(0, 257, (2, 50), generator=torch.Generator().manual_seed(0))
    hidden = backbone(tokens, WholeSequence(packed((50,))))
    loss = torch.nn.functional.cross_entropy(
        backbone.head(hidden).flatten(0, 1), tokens.roll(1).flatten()
    )
    assert loss.item() == pytest.approx(math.log(257), rel=0.02)


def test_a_backbone_goes_on_from_any_split() -> None:
    backbone = build_backbone(mixed(), 1)
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    documents = packed((13, 27))
    wanted = backbone(tokens, WholeSequence(documents))
    first, state = backbone.extend(tokens[:, :13], documents[:, :13], None)
    second, state = backbone.extend(tokens[:, 13:14], documents[:, 13:14], state)
    third, _ = backbone.extend(tokens[:, 14:], documents[:, 14:] - 1, state)
    got = torch.cat([first, second, third], dim=1)
    assert (got - wanted).norm() / wanted.norm() < 2e-6


def test_vectors_and_marked_parameters_are_not_decayed() -> None:
    names = undecayed(build_backbone(mixed(), 1))
    ends = {name.rpartition(".")[2] for name in names if "norm" not in name}
    assert ends == {"A_log", "D", "dt_bias", "bias"}
    assert all(name.endswith("weight") for name in names if "norm" in name)


@pytest.mark.parametrize("d_model", [64, 256])
def test_forward_flops_equal_those_of_torchs_counter(d_model: int) -> None:
    config = mixed(d_model=d_model, pattern="a m")
    length = 128
    with torch.device("meta"):
        backbone = Backbone(config)
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    documents = torch.zeros(1, length, dtype=torch.int32, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone.head(backbone(tokens, WholeSequence(documents)))
    # The counter does not know the convolution: 2 per tap, channel and token.
    taps = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, ShortConv))
    mixing = mix_flops(backbone, length).full_square
    ours = dense_flops_per_token(backbone) * length + mixing - 2 * taps * length
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


def test_needed_attention_flops_equal_an_enumeration_of_visible_pairs() -> None:
    mixer = AttentionConfig(n_heads=4).build(Slot(32))
    queries, keys = 5, 9
    pairs = sum(1 for i in range(keys - queries, keys) for j in range(keys) if j <= i)
    flops = mixer.mix_flops(queries, keys)
    assert flops.needed == 4 * 32 * pairs
    assert flops.full_square == 4 * 32 * queries * keys


def test_counts_equal_those_of_a_real_module() -> None:
    config = mixed()
    backbone, counted = build_backbone(config, 1), account(config, 64)
    total = sum(p.numel() for p in backbone.parameters())
    assert counted.total_parameters == total
    assert counted.non_embedding_parameters == total - 257 * 32
    documents = torch.zeros(1, 64, dtype=torch.int32)
    _, state = backbone.extend(torch.zeros(1, 64, dtype=torch.int64), documents, None)
    assert counted.state_bytes == state.bytes()


def test_a_pattern_of_unknown_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern 'm x' names \['x'\]; blocks are a, m"):
        mixed(pattern="m x")
