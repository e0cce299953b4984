"""The backbone as a whole: initial weights, splits, accounting."""

import math
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.accounting import account, dense_flops_per_token, mix_flops
from models.backbone import SELF, Backbone, BackboneConfig, BlockConfig, build_backbone, undecayed
from models.channel import NoChannelConfig, SwiGLUConfig
from models.mixer import Mixer, Pattern, Slot
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.parts.short_convs import ShortConv
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.conformance.case import MIXED, case_of, declared_cases, documents_of
from tests.conformance.causality import materialized, rounding
from tests.conformance.streaming import cut
from tests.models.conftest import D_MODEL, packed, small_config

CASES = declared_cases()

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
    with pytest.raises(ValueError, match=r"pattern 'm x' names \['x'\]; choose from blocks a, m"):
        mixed(pattern="m x")


def stack_of(kind: str, form: Literal["decoder", "encoder"]) -> Backbone:
    block = BlockConfig(small_config(kind), SwiGLUConfig(d_hidden=32))
    return build_backbone(
        BackboneConfig(
            blocks={"b": block}, pattern="b", n_layers=3, d_model=D_MODEL, vocab_size=50, form=form
        ),
        seed=1,
    )


def changed_states(backbone: Backbone, place: int) -> torch.Tensor:
    """Largest change of each hidden state when every token from `place` on is another."""
    tokens = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(0))
    others = tokens.clone()
    others[:, place:] = (others[:, place:] + 17) % 50
    sequence = WholeSequence(documents_of(MIXED))
    with torch.no_grad():
        change = backbone(others, sequence) - backbone(tokens, sequence)
    return change.abs().amax(dim=(0, 2))


@pytest.mark.parametrize("kind", [k for k, pattern in CASES if pattern is Pattern.CAUSAL_SELF])
def test_a_causal_backbone_does_not_see_later_tokens(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        backbone = stack_of(kind, "decoder").to(dtype)
        allowed = sum(rounding(m) for m in backbone.modules() if isinstance(m, Mixer))
        for place in (1, 17, 36):
            change = changed_states(backbone, place)
            assert change[:place].max() <= allowed
            assert change[place:].max() > 1e-3


@pytest.mark.parametrize("kind", [k for k, pattern in CASES if pattern is Pattern.NONCAUSAL_SELF])
def test_a_masked_backbone_sees_later_tokens_if_its_mixer_does(kind: str) -> None:
    case = case_of(kind, Pattern.NONCAUSAL_SELF)
    looks_ahead = torch.triu(materialized(case.wide, case.batch(MIXED)), diagonal=1).any()
    change = changed_states(stack_of(kind, "encoder").double(), 17)
    assert (change[:17].max() > 0) == looks_ahead


@pytest.mark.parametrize("kind", [k for k, pattern in CASES if pattern is Pattern.CAUSAL_SELF])
def test_layers_of_any_mixer_go_on_from_any_split(kind: str) -> None:
    backbone, documents = stack_of(kind, "decoder"), documents_of(MIXED)
    tokens = torch.randint(0, 50, documents.shape, generator=torch.Generator().manual_seed(0))
    state, hidden = None, []
    with torch.no_grad():
        wanted = backbone(tokens, WholeSequence(documents))
        for span, ids in cut(documents, (21, 1, 15)):
            piece, state = backbone.extend(tokens[:, span], ids, state)
            hidden.append(piece)
    assert (torch.cat(hidden, dim=1) - wanted).norm() / wanted.norm() < 2e-6


@pytest.mark.parametrize(
    ("kind", "pattern"), [(k, pattern) for k, pattern in CASES if pattern in set(SELF.values())]
)
def test_layers_that_share_a_sequence_do_not_share_what_is_theirs(kind, pattern) -> None:
    backbone = stack_of(kind, "decoder" if pattern is Pattern.CAUSAL_SELF else "encoder")
    documents = documents_of(MIXED)
    tokens = torch.randint(0, 50, documents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = backbone.embed(tokens, WholeSequence(documents))
        for layer in backbone.layers:
            x = layer(x, WholeSequence(documents))
        assert torch.equal(backbone(tokens, WholeSequence(documents)), backbone.norm(x))


def test_a_backbone_goes_on_from_no_padding() -> None:
    backbone = build_backbone(mixed(), 1)
    tokens = torch.randint(0, 257, (2, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, -1, -1]])
    hidden, state = backbone.extend(tokens, padded, None)
    alone, _ = backbone.extend(tokens[1:, :4], padded[1:, :4], None)
    assert (hidden[1:, :4] - alone).norm() < 2e-6 * alone.norm()
    with pytest.raises(ValueError, match=r"rows \[1\] of the state end in padding"):
        backbone.extend(tokens, torch.zeros_like(tokens), state)
    _, state = backbone.extend(tokens, torch.zeros_like(tokens), None)
    with pytest.raises(ValueError, match=r"the chunk has 1 rows, but the state .* has 2"):
        backbone.extend(tokens[:1], padded[:1], state)


@pytest.mark.parametrize(
    "ids",
    [[[-1, 0, 0]], [[0, -1, 0]], [[0, 1, 0]], [[0, 0, 0], [1, 0, 0]], [[-2, 0, 0]], [[0, -2, -1]]],
)
def test_document_ids_out_of_order_are_refused(ids: list[list[int]]) -> None:
    for documents in (torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        for make in (WholeSequence, lambda ids: ContinuedSequence(ids, None)):
            with pytest.raises(ValueError, match=rf"row {len(ids) - 1} are out of order"):
                make(documents)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_batches_without_tokens_are_refused(shape: tuple[int, ...]) -> None:
    for device in ("cpu", "meta"):
        documents = torch.zeros(shape, dtype=torch.int32, device=device)
        for make in (WholeSequence, lambda ids: ContinuedSequence(ids, None)):
            with pytest.raises(ValueError, match="at least 1 row of at least 1 token"):
                make(documents)
