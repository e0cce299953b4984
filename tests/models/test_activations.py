"""The bytes that training keeps are those that were predicted."""

import pytest
import torch

from models.activations import activations, counting
from models.backbone import BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig, SwiGLUConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.whole import WholeSequence

BLOCKS = {
    "a": BlockConfig(AttentionConfig(n_heads=2), SwiGLUConfig(64)),
    "m": BlockConfig(MambaConfig(), NoChannelConfig()),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["a", "m", "m a"])
def test_kept_bytes_are_within_fifteen_percent_of_the_predicted(
    pattern: str, recompute: bool
) -> None:
    config = BackboneConfig(BLOCKS, pattern, 4, 32, 257)
    backbone = build_backbone(config, 1)
    backbone.recompute = recompute
    tokens = torch.zeros(2, 96, dtype=torch.int64)
    sequence = WholeSequence(torch.zeros(2, 96, dtype=torch.int32))
    with counting(backbone.parameters()) as kept:
        hidden = backbone(tokens, sequence)
        loss = torch.nn.functional.cross_entropy(
            backbone.head(hidden).flatten(0, 1), tokens[0, 0].expand(192)
        )
    assert loss.requires_grad
    predicted = activations(config, 2, 96).kept(recompute=recompute)
    assert kept.bytes == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("pattern", ["a", "m"])
def test_recomputation_changes_no_bit(pattern: str) -> None:
    gradients = []
    tokens = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(0))
    for recompute in (False, True):
        backbone = build_backbone(BackboneConfig(BLOCKS, pattern, 3, 32, 257), 1)
        backbone.recompute = recompute
        hidden = backbone(tokens, WholeSequence(torch.zeros(2, 64, dtype=torch.int32)))
        backbone.head(hidden).square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_attention_keeps_nothing_that_grows_with_the_square_of_the_length() -> None:
    config = BackboneConfig(BLOCKS, "a", 1, 32, 257)
    short, long = (activations(config, 1, length).layers[0] for length in (512, 4096))
    assert long == pytest.approx(8 * short, rel=0.01)
