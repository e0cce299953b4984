"""Ranks that share sequences: the run is the one that a single rank trains."""

import functools
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import trainer.session
from data_pipelines.shards import certificate
from data_pipelines.stream import TokenStream
from models.backbone import BackboneConfig
from models.mixers.recurrent.mamba2 import Mamba2
from sweeps.grammar import Experiment
from tests.trainer.ranks import on_ranks
from tests.trainer.sequence_parallel import (
    LAYOUTS,
    agreement,
    experiment,
    train_all,
)
from tests.trainer.study import build_tiny, make, read_exact, run
from trainer.config import ExecutionConfig, Objective, sequences_at_once
from trainer.record import read_run
from trainer.schema import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ATTENTION = {"kind": "attention", "n_heads": 2}
NONE = {"kind": "none"}
SMALL = {"pattern": "a", "n_layers": 1, "d_model": 16, "vocab_size": 258}
NAMES = ("mamba2", "hybrid", "transformer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_all([experiment(name, root, (1, 1)) for name in NAMES], NAMES, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_and_sequence_ranks_train_the_run_of_one_rank(
    root: Path, alone: Path, tmp_path: Path, layout: tuple[int, int]
) -> None:
    train_all([experiment(name, root, layout) for name in NAMES], NAMES, tmp_path)
    for name in NAMES:
        found = agreement(alone / name, tmp_path / name)
        assert found.holds, f"{name}: {found}"
        assert found.evaluation <= 2e-5, name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"recompute": True},
        {"micro_batch_sequences": 2},
    ],
    ids=str,
)
def test_every_way_of_execution_trains_the_same_run(
    root: Path, alone: Path, tmp_path: Path, options: dict
) -> None:
    train_all([experiment("mamba2", root, (2, 2), **options)], ["mamba2"], tmp_path)
    found = agreement(alone / "mamba2", tmp_path / "mamba2")
    assert found.holds, found


@pytest.mark.distributed
def test_hidden_tokens_are_the_same_ones_over_ranks(root: Path, tmp_path: Path) -> None:
    for layout in ((1, 1), (1, 2)):
        train_all([hidden_tokens(root, layout)], ["hydra"], tmp_path / str(layout))
    found = agreement(tmp_path / "(1, 1)" / "hydra", tmp_path / "(1, 2)" / "hydra")
    assert found.holds, found


def hidden_tokens(root: Path, layout: tuple[int, int]) -> Experiment:
    """An encoder of a bidirectional mixer, trained on what is hidden of its input."""
    mixer = {"kind": "hydra", "d_state": 8, "head_dim": 8}
    blocks = {"a": {"mixer": mixer, "channel": NONE}}
    model = {**SMALL, "n_layers": 2, "blocks": blocks, "form": "encoder"}
    return with_model(experiment("mamba2", root, layout), "masked_lm", model)


def with_model(planned: Experiment, objective: Objective, model: dict) -> Experiment:
    loaded = load(BackboneConfig, model, "model")
    return replace(planned, run=replace(planned.run, objective=objective, model=loaded))


def count_streams(planned: Experiment, folder: Path) -> None:
    """Train, and leave a file for each rank that opened the data, with what it read in all."""
    import os

    read = []

    class Counted(TokenStream):
        def __iter__(self):
            for batch in super().__iter__():
                read.append(certificate(batch.samples))
                yield batch

    trainer.session.TokenStream = Counted
    run(planned, folder)
    if read:
        (folder / f"read-{os.environ['RANK']}").write_text(str(sum(read) % 2**64))


@pytest.mark.distributed
def test_each_sample_is_read_by_one_rank_of_its_group_and_counted_once(
    root: Path, tmp_path: Path
) -> None:
    planned = experiment("mamba2", root, (2, 2))
    assert on_ranks(4, functools.partial(count_streams, planned, tmp_path)) == [0] * 4
    read = {path.name: int(path.read_text()) for path in tmp_path.glob("read-*")}
    assert sorted(read) == ["read-0", "read-2"]
    total = f"{sum(read.values()) % 2**64:016x}"
    assert read_run(tmp_path).summary["certificate"] == total


@pytest.mark.distributed
def test_a_rank_killed_between_steps_leaves_no_trace_after_a_restart(
    root: Path, tmp_path: Path
) -> None:
    planned = experiment("mamba2", root, (1, 2), save_every_tokens=4 * 1024)
    train = functools.partial(run, planned)
    assert on_ranks(2, functools.partial(train, tmp_path / "whole")) == [0, 0]
    ends = on_ranks(2, functools.partial(train, tmp_path / "killed"), ["", "train.step:11"])
    assert ends[0] not in (0, None)
    assert ends[1] == -signal.SIGKILL
    assert on_ranks(2, functools.partial(train, tmp_path / "killed")) == [0, 0]
    assert read_exact(tmp_path / "killed") == read_exact(tmp_path / "whole")
    assert {row["incarnation"] for row in read_run(tmp_path / "killed").metrics} == {1, 2}


@pytest.mark.distributed
def test_a_checkpoint_does_not_depend_on_how_sequences_were_shared(
    root: Path, alone: Path, tmp_path: Path
) -> None:
    for layout, fault in (((2, 1), "train.step:11"), ((1, 2), "train.step:5"), ((2, 1), "")):
        planned = experiment("mamba2", root, layout, save_every_tokens=4 * 1024)
        ends = on_ranks(2, functools.partial(run, planned, tmp_path), [fault] * 2)
        assert ends == ([-signal.SIGKILL] * 2 if fault else [0, 0])
    found = agreement(alone / "mamba2", tmp_path)
    assert found.holds, found
    incarnations = [row["incarnation"] for row in read_run(tmp_path).metrics]
    assert incarnations == [1] * 8 + [2] * 4 + [3] * 8


def test_a_mixer_without_a_sharded_form_is_refused_by_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mamba2, "sharded", frozenset())
    with pytest.raises(ValueError, match=r"layers\.0\.mixer \(Mamba2\)"):
        run(experiment("mamba2", root, (1, 2)), tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written before"


@pytest.mark.parametrize(
    ("ranks", "shards", "message"),
    [
        (128, 128, r"sequence_parallel 128 is more than the 64 tokens of corpus\.seq_len"),
        (16, 1, r"ranks 16 / execution\.sequence_parallel 1 does not divide the 8 sequences"),
        (32, 2, r"ranks 32 / execution\.sequence_parallel 2 does not divide the 8 sequences"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    root: Path, ranks: int, shards: int, message: str
) -> None:
    planned = make(root, ranks=ranks, sequence_parallel=shards)
    with pytest.raises(ValueError, match=message):
        sequences_at_once(planned.run, planned.execution)


def test_a_source_is_not_cut_over_ranks(root: Path) -> None:
    blocks = {"a": {"mixer": ATTENTION, "cross": ATTENTION, "channel": NONE}}
    model = {**SMALL, "blocks": blocks, "encoder": {"pattern": "a"}}
    planned = with_model(make(root, ranks=2, sequence_parallel=2), "seq2seq", model)
    with pytest.raises(ValueError, match="objective seq2seq reads a source, which cannot be cut"):
        sequences_at_once(planned.run, planned.execution)


def test_sequence_shards_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="sequence_parallel 2 does not divide ranks 3"):
        ExecutionConfig(ranks=3, sequence_parallel=2)


def test_sequence_shards_leave_the_run_id_alone(root: Path) -> None:
    assert make(root, ranks=2, sequence_parallel=2).run_id == make(root).run_id
