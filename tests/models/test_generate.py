"""Generation: the state carries everything, and tokens are chosen as asked."""

import pytest
import torch

from models.backbone import Backbone, BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig, SwiGLUConfig
from models.generate import Sampling, choose, generate
from models.mixers.convolution.monarch import MonarchConfig
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


def test_the_lowest_temperatures_are_the_greedy_choice() -> None:
    logits = torch.tensor([-50.0, 90.0, 80.0]).expand(9, -1)
    for temperature in (1e-12, 1e-310, 5e-324):
        drawn = choose(logits, Sampling(temperature), torch.Generator().manual_seed(0))
        assert (drawn == 1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_token_is_chosen_by_logits_that_are_not_finite(temperature: float, value: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [value, 1.0]])
    with pytest.raises(RuntimeError, match="logits are not finite"):
        choose(logits, Sampling(temperature), torch.Generator())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_text_are_not_chosen(temperature: float) -> None:
    logits = torch.tensor([0.0, 0.1, 9.0, 9.0]).expand(200, -1)
    drawn = choose(logits, Sampling(temperature, ids=2), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == ({1} if temperature == 0 else {0, 1})


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_token_to_generate_is_refused_at_once(backbone: Backbone, tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"{tokens} tokens are to be generated; ask for 1"):
        generate(backbone, torch.zeros(1, 1, dtype=torch.int64), tokens, Sampling())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"shape \(1, 0\); give at least one token"),
        (torch.zeros(0, 3, dtype=torch.int64), r"shape \(0, 3\); give at least one token"),
        (torch.tensor([[3, 40]]), "ids 3 to 40, but the model has 0 to 39"),
        (torch.tensor([[-1, 4]]), "ids -1 to 4, but the model has 0 to 39"),
    ],
)
def test_a_prompt_that_is_not_the_models_is_refused(
    backbone: Backbone, prompt: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(backbone, prompt, 1, Sampling())


def test_no_more_is_generated_than_there_are_positions() -> None:
    block = BlockConfig(AttentionConfig(n_heads=2), NoChannelConfig())
    fixed = BlockConfig(MonarchConfig(max_len=8), NoChannelConfig())
    configs = [
        BackboneConfig({"b": block}, "b", 1, 16, 40, learned_positions=8),
        BackboneConfig({"b": fixed}, "b", 1, 16, 40),
    ]
    for config in configs:
        small = build_backbone(config, 1)
        assert len(list(generate(small, torch.zeros(1, 5, dtype=torch.int64), 4, Sampling()))) == 4
        for length, tokens in ((5, 5), (9, 1)):
            prompt = torch.zeros(1, length, dtype=torch.int64)
            with pytest.raises(ValueError, match="needs 9 positions, but the model has 8"):
                generate(small, prompt, tokens, Sampling())


def test_a_document_beyond_the_learned_positions_is_refused() -> None:
    block = BlockConfig(AttentionConfig(n_heads=2), NoChannelConfig())
    small = build_backbone(BackboneConfig({"b": block}, "b", 1, 16, 40, learned_positions=8), 1)
    tokens, ids = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a document has 9 tokens, .* learned_positions 8"):
        small(tokens, WholeSequence(ids))
    _, state = small.extend(tokens[:, :8], ids[:, :8], None)
    with pytest.raises(ValueError, match=r"a document has 9 tokens"):
        small.extend(tokens[:, :1], ids[:, :1], state)


def test_shares_and_temperatures_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_p 0\.0 is not in \(0, 1\]"):
        Sampling(top_p=0.0)
    with pytest.raises(ValueError, match=r"temperature -1\.0 is negative"):
        Sampling(temperature=-1.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"temperature {value} is not finite"):
            Sampling(temperature=value)
    with pytest.raises(ValueError, match=r"top_p nan is not in"):
        Sampling(top_p=float("nan"))
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed {seed} is out of range"):
            Sampling(seed=seed)
    with pytest.raises(ValueError, match="0 ids to choose from"):
        Sampling(ids=0)
