"""What can be known before anything is spent is refused by --plan: one line, exit 64, no file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.sweep import main
from launch.train import main as train
from sweeps.checks import nodes_of
from sweeps.config import LauncherConfig

SCALING = "sweeps/scaling.yaml"
MIXTURE = "corpora.embedded.mixtures.mostly_python.domains"
SIXTEEN_RANKS = ("launcher.cluster=slurm", "execution.ranks=16", "ladders.nano.batch_tokens=8192")
SHARDED = ["execution.ranks=2", "execution.sequence_parallel=2"]
NYSTROM = ["objective=masked_lm", "model.blocks.a.mixer={kind: nystrom, n_heads: 2}"]

LATE = [
    (["execution.ranks=3"], "execution.ranks 3"),
    (
        ["execution.ranks=8", "execution.threads=64", "optimizer.batch_tokens=4096"],
        "need 512 slots",
    ),
    (["execution.ranks=8"], "each rank reads whole blocks of 2"),
    (["execution.threads=1000"], "need 1000 slots"),
    (["launcher.cluster=inline", "execution.ranks=2"], "inline trains in one process"),
    (["execution.device=cuda"], "no GPU here"),
    (["execution.micro_batch_sequences=3"], "micro_batch_sequences 3"),
    ([*SHARDED, "architectures=[transformer]", *NYSTROM], "sharded form"),
    (["corpora.embedded.neutral_set=pros"], "did you mean 'prose'"),
    ([f"{MIXTURE}.python=0.6", f"{MIXTURE}.pyton=0.1"], "did you mean 'python'"),
    (["model.n_layers=7"], "asks for 9780 parameters"),
    (["model.d_model=64"], "asks for 9780 parameters"),
    (["model.d_model=0"], "model.d_model 0"),
    (["model.n_layers=-1"], "model.n_layers -1"),
    (["model.norm_eps=-1"], "norm_eps -1"),
    (["model.norm_eps=0"], "norm_eps 0"),
    (["model.embedding_std=-1"], "embedding_std -1"),
    (["model.pattern=z"], "names ['z']"),
    (["model.blocks.a.mixer.rope_theta=0"], "rope_theta 0"),
    (["model.blocks.a.mixer.rope_theta=-3"], "rope_theta -3"),
    (["model.blocks.a.mixer.n_kv_heads=0"], "n_kv_heads 0"),
    (["model.blocks.a.mixer.n_kv_heads=-1"], "n_kv_heads -1"),
    (["model.blocks.a.mixer.initial_std=-1"], "initial_std -1"),
    (["model.blocks.m.mixer.dt_rank=0"], "dt_rank 0"),
    (["optimizer.beta1=1.0"], "beta1 1.0"),
    (["optimizer.beta2=1"], "beta2 1.0"),
    (["optimizer.batch_tokens=0"], "batch_tokens 0"),
    (["ladders.nano.batch_tokens=0"], "batch_tokens 0"),
    (["ladders.nano.horizons=[-2048]"], "horizons -2048"),
    (["ladders.nano.horizons=[0]"], "horizons 0"),
    (["ladders.nano.seeds=[17,17]"], "names 17 twice"),
    (["ladders.nano.seeds=[010]"], "'010'"),
    (["ladders.nano.seeds=[-1]"], "seed -1"),
    (["ladders.nano.seeds=[]"], "seeds [] is empty"),
    (["ladders.nano.evaluation.milestones=[-1]"], "milestones [-1]"),
    (["ladders.nano.learning_rate_factors=[0]"], "learning_rate_factors 0"),
    (["launcher.slots=-3"], "slots -3"),
    (["launcher.slots=0"], "slots 0"),
    (["launcher.cluster=slurm", "launcher.minutes=0"], "minutes 0"),
    ([*SIXTEEN_RANKS, "launcher.ranks_per_node=6"], "launcher.ranks_per_node 6"),
    ([*SIXTEEN_RANKS, "launcher.gpus_per_node=3"], "launcher.gpus_per_node 3"),
    (["baselines=[0]"], "baselines [0]"),
    (["schedule.warmup_tokens=10000000"], "never reaches its peak"),
    (["schedule.warmup_tokens=200000"], "never reaches its peak"),
    (["schedule.decay_fraction=1.0"], "decays from the first"),
    (["schedule.decay_fraction=0.999"], "decays from the first"),
    (["mask_rate=0.5"], "causal_lm hides nothing"),
    (["objective=masked_lm"], "supports causal_self"),
    (["ladder=[1,"], "cannot be read"),
    (["ladder=[nano]"], "ladder is ['nano']"),
    (["also=text"], "also is 'text'"),
]


@pytest.mark.parametrize(("words", "message"), LATE, ids=lambda each: str(each)[:60])
def test_what_can_be_known_is_refused_by_the_plan(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder = [] if words[0].startswith("ladder=") else ["ladder=nano"]
    runs, data = tmp_path / "runs", f"execution.data_root={tmp_path / 'data'}"
    assert main([SCALING, *ladder, data, *words, "--plan", "--runs", str(runs)]) == 64
    printed = capsys.readouterr().out
    assert message in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["execution.threads=1000"], "need 1000 slots"),
        (["model.blocks.m.mixer.dt_rank=0"], "dt_rank 0"),
        (["corpus.domains.pyton=0.1", "corpus.domains.python=0.6"], "did you mean 'python'"),
        (["dataset.name=other"], "dataset.name is other, but corpus.dataset is embedded"),
        (["dataset.block_tokens=1024"], "but corpus.block_tokens is 512"),
        (["model.n_layers=1000000000"], "model.n_layers"),
        (["schedule.decay_fraction=1"], "decays from the first"),
        (["schedule.warmup_tokens=450560"], "never reaches its peak"),
        (["execution.tracker=false"], "execution.tracker is False"),
        (["execution.zero_stage=true"], "zero_stage is True"),
        (["execution=null"], "execution is None"),
        (["corpus.name="], "corpus.name"),
        (["corpus.name=$\\bad{$"], "without $"),
        (["architecture=$x$"], "without $"),
    ],
)
def test_what_can_be_known_is_refused_before_a_run_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if words[0].startswith("execution=") else [f"execution.data_root={tmp_path / 'd'}"]
    code = train(["sweeps/single.yaml", *data, *words, "--runs", str(tmp_path / "runs")])
    assert code == 64
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_given_depth_takes_part_in_the_search_for_a_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ladder=nano", "architectures=[transformer]", "model.n_layers=3", "--plan"]
    assert main([SCALING, *words, "--runs", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " transformer " in line]
    off = [abs(float(word[:-1])) for line in rows for word in line.split() if word[-1] == "%"]
    assert off
    assert max(off) < 10


@pytest.mark.parametrize(
    ("ranks", "launcher", "nodes"),
    [
        (16, {"gpus_per_node": 8}, (2, 8)),
        (4, {"gpus_per_node": 8}, (1, 4)),
        (16, {}, (1, 16)),
        (16, {"ranks_per_node": 4}, (4, 4)),
        (16, {"ranks_per_node": 4, "gpus_per_node": 8}, (4, 4)),
        (1, {"ranks_per_node": 4}, (1, 1)),
    ],
)
def test_nodes_are_computed_from_ranks_and_gpus(
    ranks: int, launcher: dict[str, int], nodes: tuple[int, int]
) -> None:
    assert nodes_of(ranks, LauncherConfig(cluster="slurm", **launcher)) == nodes


@pytest.mark.parametrize(("command", "missing"), [(main, "sweep"), (train, "run")])
def test_without_a_file_only_the_file_is_missed(
    command: Callable[[list[str]], int], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command([])
    assert capsys.readouterr().err.rstrip().endswith(f"arguments are required: {missing}")
