"""Generation: the state carries everything, and tokens are chosen as asked."""

import pytest
import torch

from models.backbone import Backbone, BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig, SwiGLUConfig
from models.generate import Sampling, choose, generate
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.sequences.whole import WholeSequence


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    attention = BlockConfig(AttentionConfig(n_heads=2, initial_std=0.3), SwiGLUConfig(16, 0.3))
    blocks = {"a": attention, "m": BlockConfig(MambaConfig(), NoChannelConfig())}
    config = BackboneConfig(blocks, "a m", 2, 16, 40, embedding_std=0.3)
    return build_backbone(config, 3)


def test_greedy_tokens_are_the_likeliest_of_the_whole_sequence(backbone: Backbone) -> None:
    prompt = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    new = [piece.tokens for piece in generate(backbone, prompt, 9, Sampling(temperature=0.0))]
    tokens = torch.cat([prompt, torch.stack(new, dim=1)], dim=1)
    hidden = backbone(tokens, WholeSequence(torch.zeros(2, 16, dtype=torch.int32)))
    likeliest = backbone.head(hidden).argmax(dim=-1)
    assert torch.equal(likeliest[:, 6:-1], tokens[:, 7:])


def test_the_seed_decides_the_draws(backbone: Backbone) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    drawn = [
        [int(piece.tokens) for piece in generate(backbone, prompt, 12, Sampling(seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    shares = torch.tensor([0.25, 0.55, 0.05, 0.15])
    logits = shares.log().expand(4000, -1)
    drawn = choose(logits, Sampling(top_p=top_p), torch.Generator().manual_seed(0))
    order = shares.argsort(descending=True)
    counts = torch.bincount(drawn, minlength=4)[order] / 4000
    wanted = shares[order][:kept] / shares[order][:kept].sum()
    assert (counts[kept:] == 0).all()
    assert torch.allclose(counts[:kept].float(), wanted, atol=0.03)


def test_a_low_temperature_is_nearly_greedy() -> None:
    logits = torch.tensor([0.0, 0.3, 0.2]).expand(500, -1)
    drawn = choose(logits, Sampling(temperature=0.005), torch.Generator().manual_seed(0))
    assert (drawn == 1).all()


def test_shares_and_temperatures_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_p 0\.0 is not in \(0, 1\]"):
        Sampling(top_p=0.0)
    with pytest.raises(ValueError, match=r"temperature -1\.0 is negative"):
        Sampling(temperature=-1.0)
