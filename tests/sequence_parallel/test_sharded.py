"""Shards on real processes give what the whole gives, and what they say to each other."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.backbone import BackboneConfig, BlockConfig, build_backbone
from models.channel import NoChannelConfig
from models.mixer import Mixer, MixerConfig, Pattern, Slot, refuse_unsharded
from models.mixers.composed.parallel import ParallelConfig
from models.mixers.recurrent.hydra import HydraConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.recurrent.mamba2 import Mamba2Config
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.hip import HipConfig
from models.ranks.communicator import Sent
from models.ranks.schemes import Scheme
from models.sequences.sharded import ShardedSequence
from models.sequences.whole import WholeSequence
from tests.models.conftest import D_MODEL, drawn
from tests.oracles import prefix_messages
from tests.sequence_parallel.compare import Verdict, judge_all, save_solutions
from tests.sequence_parallel.mutants import MUTANTS, mutant_problems, try_mutants
from tests.sequence_parallel.problem import (
    ARCHITECTURES,
    Problem,
    carried_problems,
    fewer_problems,
    model,
    refusing_mixers,
    sharded_mixers,
)
from tests.sequence_parallel.world import on_ranks

pytestmark = pytest.mark.distributed
ROWS = 3
STATES: dict[str, tuple[MixerConfig, int, int]] = {
    # Inner width E = 32 and state N: E N numbers of state, and one decay a head or channel.
    "mamba2": (Mamba2Config(d_state=6, head_dim=8), 32 * 6, 32 // 8),
    "mamba": (MambaConfig(d_state=5), 32 * 5, 32),
    # Both ways in one message.
    "hydra": (HydraConfig(d_state=6, head_dim=8), 2 * 32 * 6, 2 * 32 // 8),
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_give_outputs_and_gradients_of_the_whole(ranks: int, tmp_path: Path) -> None:
    _hold(_verdicts(fewer_problems(ranks), ranks, tmp_path))


def test_eight_ranks_give_outputs_and_gradients_of_the_whole(tmp_path: Path) -> None:
    models = [model(name, "short shards", "float32", recompute=True) for name in ARCHITECTURES]
    _hold(_verdicts(carried_problems() + models, 8, tmp_path))


def test_every_named_recurrence_is_carried_under_each_scheme() -> None:
    carried = {(problem.name, problem.scheme) for problem in carried_problems()}
    assert {name for name, _ in carried} >= {"mamba", "mamba2", "hybrid", "hydra noncausal_self"}
    assert {(name, scheme) for name, _ in carried for scheme in Scheme} == carried


def test_every_wrong_line_is_seen(tmp_path: Path) -> None:
    save_solutions(mutant_problems(), tmp_path / "solutions")
    attempt = functools.partial(try_mutants, tmp_path / "solutions")
    caught = [*on_ranks(4, attempt), *on_ranks(8, attempt)]
    unseen = [each.mutant.what for each in caught if not min(each.margins.values()) > 1]
    assert len(caught) == len(MUTANTS)
    assert not unseen


def test_a_line_that_does_not_stand_in_its_function_is_no_mutant() -> None:
    strange = dataclasses.replace(MUTANTS[0], line="nowhere")
    with pytest.raises(ValueError, match="0 times"), strange.applied():
        pass


def test_every_causal_mixer_has_a_sharded_form() -> None:
    assert {name for name in refusing_mixers() if " " not in name} == set()
    assert "hydra noncausal_self" in sharded_mixers()


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_states_are_sent_as_simulated_at_any_length(kind: str, ranks: int) -> None:
    _, state, decays = STATES[kind]
    ways = 2 if kind == "hydra" else 1
    sizes = prefix_messages.Sizes(4 * ROWS * state, 4 * ROWS * decays, ways)
    found = on_ranks(ranks, functools.partial(_messages, kind, (4, 16)))
    assert len(found) == len(Scheme) * 2
    for (scheme, _), everyones in found.items():
        for what, back in (("state", False), ("state gradient", True)):
            rounds = prefix_messages.messages(scheme, ranks, sizes, back=back)
            for rank, sent in enumerate(everyones):
                mine = [(to, x.bytes // len(x.to)) for x in sent if x.what == what for to in x.to]
                # Both ways go at once, in either order.
                assert sorted(mine) == sorted(prefix_messages.sent(rounds, rank))


@pytest.mark.parametrize("kind", STATES)
def test_convolutions_send_as_much_at_any_length(kind: str) -> None:
    short, long = on_ranks(4, functools.partial(_sent_at_lengths, kind, (8, 16)))
    assert short["halo"] == long["halo"]


def test_states_are_sent_in_float32_under_bfloat16() -> None:
    plain, lowered = on_ranks(2, _sent_under_autocast)
    assert lowered["state"] == plain["state"]
    assert lowered["state gradient"] == plain["state gradient"]
    assert lowered["halo"] == plain["halo"] // 2


def test_bfloat16_shards_are_as_near_to_the_whole_as_its_rounding() -> None:
    assert on_ranks(2, _bfloat16_error) < 1e-2


def test_shards_of_different_rows_are_refused_on_every_rank() -> None:
    assert on_ranks(2, _refused_rows) == 2


def test_a_backbone_without_a_sharded_form_is_refused_by_name() -> None:
    searching = HipConfig(n_heads=2, refresh=4, window=8)
    mixers: dict[str, MixerConfig] = {"near": AttentionConfig(n_heads=2), "far": searching}
    for mixer in (searching, ParallelConfig(mixers)):
        with pytest.raises(ValueError, match=r"layers\.0\.mixer .*refresh 4.*take selection row"):
            refuse_unsharded(_backbone(mixer))
    refuse_unsharded(_backbone(AttentionConfig(n_heads=2)))


def test_a_recurrence_that_only_runs_from_a_state_is_refused() -> None:
    assert on_ranks(2, _refused_lambda) == "refused"


def _verdicts(problems: list[Problem], ranks: int, folder: Path) -> list[Verdict]:
    save_solutions(problems, folder / "solutions")
    return on_ranks(ranks, functools.partial(judge_all, problems, folder / "solutions"))


def _hold(verdicts: list[Verdict]) -> None:
    wrong = [verdict for verdict in verdicts if not verdict.margin <= 1]
    assert verdicts
    assert not wrong


def _sent_at_lengths(
    kind: str, lengths: tuple[int, ...], group: dist.ProcessGroup
) -> list[dict[str, int]]:
    return [_sent(_mixer(kind), length, group) for length in lengths]


def _messages(
    kind: str, lengths: tuple[int, ...], group: dist.ProcessGroup
) -> dict[tuple[Scheme, int], list[list[Sent]]]:
    """What every rank sent, by scheme and length."""
    found: dict[tuple[Scheme, int], list[list[Sent]]] = {}
    for scheme in Scheme:
        for length in lengths:
            documents = torch.zeros(ROWS, length, dtype=torch.int32)
            sequence = ShardedSequence(documents, group, scheme)
            x = torch.randn(ROWS, length, D_MODEL).requires_grad_()
            _mixer(kind)(x, sequence).sum().backward()
            everyones: list[list[Sent]] = [[] for _ in range(sequence.ranks.size)]
            dist.all_gather_object(everyones, sequence.ranks.sent, group=group)
            found[scheme, length] = everyones
    return found


def _sent_under_autocast(group: dist.ProcessGroup) -> list[dict[str, int]]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = _sent(_mixer("mamba2"), 8, group)
    return [_sent(_mixer("mamba2"), 8, group), lowered]


def _sent(mixer: Mixer, length: int, group: dist.ProcessGroup) -> dict[str, int]:
    """Bytes that the last rank sent forward and back, by what they were."""
    documents = torch.zeros(ROWS, length, dtype=torch.int32)
    sequence = ShardedSequence(documents, group, Scheme.GATHER)
    mixer(torch.randn(ROWS, length, D_MODEL).requires_grad_(), sequence).float().sum().backward()
    found: list[list[Sent] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, sequence.ranks.sent, group=group)
    total: dict[str, int] = {}
    for each in found[0] or []:
        total[each.what] = total.get(each.what, 0) + each.bytes
    return total


def _bfloat16_error(group: dist.ProcessGroup) -> float:
    generator = torch.Generator().manual_seed(2)
    x, rank = torch.randn(ROWS, 32, D_MODEL, generator=generator), dist.get_rank(group)
    documents, mine = torch.zeros(ROWS, 32, dtype=torch.int32), slice(16 * rank, 16 * rank + 16)
    mixer = _mixer("mamba2")
    whole = mixer(x, WholeSequence(documents))[:, mine]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shard = mixer(x[:, mine], ShardedSequence(documents[:, mine], group))
    error = ((shard - whole).norm() / whole.norm()).detach()
    dist.all_reduce(error, dist.ReduceOp.MAX, group=group)
    return error.item()


def _refused_rows(group: dist.ProcessGroup) -> int:
    documents = torch.zeros(1 + dist.get_rank(group), 4, dtype=torch.int32)
    refused = torch.tensor(_raises(lambda: ShardedSequence(documents, group), "rows and tokens"))
    dist.all_reduce(refused, group=group)
    return int(refused)


def _refused_lambda(group: dist.ProcessGroup) -> str:
    sequence = ShardedSequence(torch.zeros(1, 4, dtype=torch.int32), group)
    state = torch.zeros(1, 2)
    refused = _raises(
        lambda: sequence.recur(lambda _: (state, state)), "models.sequences.recurrence"
    )
    return "refused" if refused else "run"


def _raises(action: Callable[[], object], words: str) -> int:
    try:
        action()
    except ValueError as error:
        return int(words in str(error))
    return 0


def _mixer(kind: str) -> Mixer:
    pattern = Pattern.NONCAUSAL_SELF if kind == "hydra" else Pattern.CAUSAL_SELF
    return drawn(STATES[kind][0].build(Slot(D_MODEL, 2, pattern)), seed=0)


def _backbone(mixer: MixerConfig) -> torch.nn.Module:
    block = BlockConfig(mixer, NoChannelConfig())
    return build_backbone(BackboneConfig({"b": block}, "b", 1, D_MODEL, 7), seed=0)
