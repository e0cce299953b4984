"""HiP attention against float64 loops, dense attention, and its own searches at other times."""

import numpy as np
import pytest
import torch

from models.accounting import account
from models.backbone import BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig
from models.mixers.softmax import hip
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.hip import Hip, HipConfig
from models.sequences.continued import ContinuedSequence
from models.sequences.whole import WholeSequence
from tests.kernels.largest_tensor import LargestTensor
from tests.models.conftest import build, inputs, packed, whole
from tests.oracles import hip as oracle

STAGED = {"method": "staged", "stage_chunks": (4, 2, 1), "stage_keeps": (4, 2, 1)}
SETTINGS = {
    "rows": {"k": 6, "key_block": 1, "n_sink": 1, "window": 3},
    "grouped rows": {"k": 4, "n_heads": 4, "n_kv_heads": 2},
    "staged rows": {"k": 4, "n_sink": 1, "window": 3, **STAGED},
    "blocks": {"k": 4, "selection": "block", "query_block": 8},
    "staged blocks": {"k": 4, "selection": "block", "query_block": 8, **STAGED},
    "refreshed": {"k": 4, "n_sink": 1, "refresh": 3},
    "staged, refreshed": {"k": 4, "n_sink": 1, "refresh": 3, **STAGED},
}
LENGTHS = (9, 1, 27, 3)
MIXED = torch.cat([packed(LENGTHS, rows=1), packed((40,), rows=1)])


def of_hip(**fields: object) -> Hip:
    mixer = build("hip", **fields)
    assert isinstance(mixer, Hip)
    return mixer.eval()


@torch.no_grad()
def in_pieces(mixer: Hip, x: torch.Tensor, documents: torch.Tensor, pieces: tuple[int, ...]):
    """Outputs of the pieces put together, and the state after the last."""
    state, outputs, begin = None, [], 0
    for n in pieces:
        ids = documents[:, begin : begin + n]
        before = documents[:, begin - 1 : begin] if begin else torch.zeros_like(ids[:, :1])
        sequence = ContinuedSequence(ids - before, state)
        sequence.enter_layer()
        outputs.append(mixer(x[:, begin : begin + n], sequence))
        sequence.leave_layer()
        state, begin = sequence.state(), begin + n
    assert begin == x.shape[1]
    return torch.cat(outputs, dim=1), state


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("setting", SETTINGS)
def test_hip_equals_loops_over_ranges_and_keys(setting: str) -> None:
    mixer, x = of_hip(**SETTINGS[setting]), inputs(40)
    weights = {name: p.detach().numpy() for name, p in mixer.named_parameters()}
    with torch.no_grad():
        got = mixer(x, WholeSequence(MIXED)).double().numpy()
    config = mixer.config
    sizes = {name: getattr(config, name) for name in ("k", "key_block", "n_sink", "window")}
    sizes["refresh"] = config.refresh
    if config.selection == "block":
        sizes["query_block"] = config.query_block
    if config.method == "staged":
        sizes["stages"] = list(config.stages())
    for row in range(2):
        heads = config.n_heads, config.kv_heads
        wanted = oracle.hip(weights, x[row].numpy(), MIXED[row].numpy(), heads, sizes)
        assert np.linalg.norm(got[row] - wanted) / np.linalg.norm(wanted) < 2e-6


@pytest.mark.parametrize("setting", SETTINGS)
def test_with_room_for_every_key_hip_is_attention(setting: str) -> None:
    """Under refresh this also says that no key is lost between two searches."""
    fields = {**SETTINGS[setting], "k": 40, "n_sink": 0, "window": 5}
    mixer, x = of_hip(**fields), inputs(40)
    shared = {name: fields[name] for name in ("n_heads", "n_kv_heads") if name in fields}
    attention = build("attention", seed=5, **shared)
    mixer.load_state_dict(attention.state_dict(), strict=True)
    with torch.no_grad():
        assert off(mixer(x, WholeSequence(MIXED)), attention(x, WholeSequence(MIXED))) < 1e-6
        pieces, _ = in_pieces(mixer, x, MIXED, (13, 1, 1, 10, 1, 14))
    assert off(pieces, attention(x, WholeSequence(MIXED))) < 2e-6


@pytest.mark.parametrize("setting", SETTINGS)
def test_with_a_window_as_long_as_the_sequence_hip_is_attention(setting: str) -> None:
    fields = {**SETTINGS[setting], "window": 40, "k": 2, "key_block": 2}
    mixer, x = of_hip(**fields), inputs(40)
    shared = {name: fields[name] for name in ("n_heads", "n_kv_heads") if name in fields}
    attention = build("attention", **shared)
    mixer.load_state_dict(attention.state_dict(), strict=True)
    with torch.no_grad():
        assert off(mixer(x, whole(40)), attention(x, whole(40))) < 1e-6


def test_a_trained_transformers_weights_load_and_hip_differs_only_in_what_it_reads() -> None:
    def transformer(mixer: AttentionConfig) -> BackboneConfig:
        blocks = {"a": BlockConfig(mixer, NoChannelConfig())}
        return BackboneConfig(blocks, pattern="a", n_layers=2, d_model=16, vocab_size=50)

    dense = build_backbone(transformer(AttentionConfig(n_heads=2)), 1)
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = dense(tokens, whole(40))
    for k, equal in ((40, True), (4, False)):
        sparse = build_backbone(transformer(HipConfig(n_heads=2, k=k, n_sink=1, window=2)), 2)
        sparse.load_state_dict(dense.state_dict(), strict=True)
        error = off(sparse(tokens, whole(40)), expected)
        assert error < 1e-6 if equal else error > 1e-3


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("setting", SETTINGS)
def test_documents_shorter_than_any_block_are_attention(setting: str, length: int) -> None:
    fields = {**SETTINGS[setting], "k": 4, "key_block": 2, "window": 5, "n_sink": 1}
    mixer, x = of_hip(**fields), inputs(length)
    with torch.no_grad():
        mixed = mixer(x, whole(length))
    assert mixed.isfinite().all()
    if length <= 4:
        shared = {name: fields[name] for name in ("n_heads", "n_kv_heads") if name in fields}
        attention = build("attention", **shared)
        attention.load_state_dict(mixer.state_dict())
        assert off(mixed, attention(x, whole(length))) < 1e-6


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "blocks" not in s])
@pytest.mark.parametrize("pieces", [(2, 1, 1, 1, 35), (5, 1, 34), (10, 1, 29), (11, 29)])
def test_rows_choose_the_same_in_any_split(setting: str, pieces: tuple[int, ...]) -> None:
    mixer, x = of_hip(**SETTINGS[setting]), inputs(40)
    with torch.no_grad():
        expected = mixer(x, WholeSequence(MIXED))
    assert off(in_pieces(mixer, x, MIXED, pieces)[0], expected) < 2e-6


@pytest.mark.parametrize("setting", ["rows", "refreshed"])
def test_decoding_token_by_token_is_the_whole_forward(setting: str) -> None:
    mixer, x = of_hip(**SETTINGS[setting]), inputs(40)
    with torch.no_grad():
        expected = mixer(x, WholeSequence(MIXED))
    assert off(in_pieces(mixer, x, MIXED, (1,) * 40)[0], expected) < 2e-6


def test_outputs_where_a_search_is_made_are_those_of_searching_always() -> None:
    fields, x = SETTINGS["refreshed"], inputs(40)
    with torch.no_grad():
        reusing = of_hip(**fields)(x, whole(40))
        always = of_hip(**{**fields, "refresh": 1})(x, whole(40))
    assert off(reusing[:, ::3], always[:, ::3]) < 1e-6
    assert off(reusing[:, 1::3], always[:, 1::3]) > 1e-3


def test_decoding_searches_only_where_the_refresh_divides_the_place(monkeypatch) -> None:
    searched, tree_search = [], hip.tree_search

    def counting(queries, keys, blocks, search):
        searched.append(blocks.positions[0, :, 0].tolist())
        return tree_search(queries, keys, blocks, search)

    monkeypatch.setattr(hip, "tree_search", counting)
    mixer = of_hip(k=4, refresh=4, window=6)
    in_pieces(mixer, inputs(15), packed((15,)), (6, 1, 1, 1, 1, 3, 1, 1))
    assert searched == [[0, 4], [8], [12]]


def test_blocks_are_decoded_token_by_token_on_lists_of_the_last_search() -> None:
    """Published: prefill by blocks, then steps that reuse a list until the next refresh."""
    fields = {"k": 4, "n_sink": 1, "window": 6, "selection": "block", "query_block": 8}
    x, documents = inputs(40), packed((40,))
    steps = (20, *(1,) * 20)
    reusing, _ = in_pieces(of_hip(**fields, refresh=4), x, documents, steps)
    always, _ = in_pieces(of_hip(**fields, refresh=1), x, documents, steps)
    searched = [t for t in range(20, 40) if t % 4 == 0]
    reused = [t for t in range(20, 40) if t % 4]
    assert off(reusing[:, :20], always[:, :20]) < 1e-6
    assert off(reusing[:, searched], always[:, searched]) < 1e-6
    assert off(reusing[:, reused], always[:, reused]) > 1e-3


def test_the_decoding_state_is_attentions_and_under_refresh_one_list_more() -> None:
    x, documents = inputs(12), packed((12,))
    _, state = in_pieces(of_hip(), x, documents, (5, 7))
    assert [tuple(t.shape) for t in state.layers[0]] == [(2, 12, 2, 8)] * 2
    _, state = in_pieces(of_hip(refresh=2), x, documents, (5, 7))
    assert [tuple(t.shape) for t in state.layers[0]] == [(2, 12, 2, 8)] * 2 + [(2, 2, 4)]
    assert not state.layers[0][2].is_floating_point()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_reads_another_document(setting: str) -> None:
    mixer, x = of_hip(**SETTINGS[setting]), inputs(40)
    with torch.no_grad():
        matrix = mixer.materialize(x, WholeSequence(MIXED))
    apart = (MIXED[:, :, None] != MIXED[:, None, :])[:, None]
    later = torch.ones(40, 40, dtype=torch.bool).triu(1)
    assert matrix.masked_select(apart | later).count_nonzero() == 0
    assert (matrix.sum(dim=3) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("longest", [31, 32, 33])
def test_the_longest_of_packed_documents_is_searched_to_its_end(longest: int) -> None:
    mixer, x = of_hip(k=4, key_block=1, n_sink=0, window=1), inputs(longest + 4)
    with torch.no_grad():
        together = mixer(x, WholeSequence(packed((longest, 4))))
        alone = mixer(x[:, :longest], whole(longest))
    assert off(together[:, :longest], alone) < 2e-6


def test_blocks_know_later_tokens_of_their_own_and_say_so() -> None:
    mixer, x = of_hip(**SETTINGS["blocks"]), inputs(40)
    changed = x.clone()
    changed[:, 29] *= -3.0
    with torch.no_grad():
        differ = (mixer(x, whole(40)) != mixer(changed, whole(40))).any(2).any(0)
    assert not differ[:24].any()
    assert differ[24:29].any()
    assert "later tokens" in mixer.config.approximate_reason


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "block" in s or "refreshed" in s])
def test_what_is_for_evaluation_only_refuses_to_be_trained(setting: str) -> None:
    mixer, x = of_hip(**SETTINGS[setting]), inputs(20)
    with pytest.raises(ValueError, match=r"evaluation only .* train with selection row"):
        mixer(x, whole(20))
    with torch.no_grad():
        assert mixer(x, whole(20)).isfinite().all()


def test_rows_give_attentions_gradients_where_they_read_every_key() -> None:
    mixer, attention, x = of_hip(k=40, n_sink=0, window=1), build("attention"), inputs(40)
    for each in (mixer, attention):
        each(x, WholeSequence(MIXED)).square().sum().backward()
    for name, expected in attention.named_parameters():
        gradient = mixer.get_parameter(name).grad
        assert gradient is not None
        assert expected.grad is not None
        assert off(gradient, expected.grad) < 1e-5


def test_no_tensor_grows_with_the_square_of_the_length_even_if_packed() -> None:
    mixer, largest = of_hip(k=4), []
    for length in (512, 1024):
        x, documents = inputs(length, rows=1), packed((length // 2, length // 2), rows=1)
        with LargestTensor() as tensors, torch.no_grad():
            mixer(x, WholeSequence(documents))
        largest.append(tensors.numbers)
    assert largest[1] <= 2 * largest[0] < 512 * 512


@pytest.mark.parametrize("setting", ["rows", "refreshed", "blocks", "staged rows"])
def test_flops_are_those_of_keys_read_and_keys_scored_counted_one_by_one(setting: str) -> None:
    mixer = of_hip(**SETTINGS[setting])
    config, H, P = mixer.config, mixer.config.n_heads, mixer.head_dim
    read = scored = 0
    for place in range(70, 100):
        read += min(place + 1, config.k + config.n_sink + config.window)
        last = place
        if config.selection == "block":
            last = min(place - place % config.query_block + config.query_block, 100) - 1
        if config.selection == "block" or place % config.refresh == 0:
            scored += int(config.keys_scored(torch.tensor([last])))
    flops = mixer.mix_flops(30, 100)
    assert flops.needed == 4 * H * P * read + 2 * H * P * scored
    assert flops.full_square == build("attention").mix_flops(30, 100).full_square
    assert scored > 0


def test_needed_flops_do_not_grow_with_the_square_of_the_length() -> None:
    needed = [of_hip(k=64).mix_flops(n, n).needed / n for n in (4096, 8192, 16384)]
    assert needed[2] - needed[1] == pytest.approx(needed[1] - needed[0], rel=0.1)


def test_state_is_counted_without_memory_as_decoding_keeps_it() -> None:
    mixer = HipConfig(n_heads=2, k=8, window=8, refresh=4)
    blocks = {"h": BlockConfig(mixer, NoChannelConfig())}
    config = BackboneConfig(blocks, pattern="h", n_layers=2, d_model=16, vocab_size=50)
    tokens = torch.zeros(1, 50, dtype=torch.int64)
    with torch.no_grad():
        _, state = build_backbone(config, 1).extend(tokens, packed((50,), rows=1), None)
    assert account(config, 50).state_bytes == state.bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 7}, "k 7 is not a multiple of key_block 2"),
        ({"window": 0}, "window 0 is not positive"),
        ({"n_sink": -1}, "n_sink -1 is negative"),
        ({"refresh": 8, "window": 9}, "window 9 is shorter than the 8 tokens .* take 10 or more"),
        ({"stage_chunks": (4, 2)}, "do not describe the same stages"),
        ({"stage_chunks": (4, 3, 1)}, "do not narrow down"),
        ({"stage_keeps": (2, 4, 1)}, "do not narrow down"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HipConfig(n_heads=2, **fields)
