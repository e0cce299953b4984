"""Sweep files: what they expand to, and how they fail."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import make_plan
from sweeps.grammar import read_sweep_file, trunks_of
from trainer.ids import run_id
from trainer.schema import ConfigError

ROOT = Path(__file__).parent.parent.parent
SCALING = ROOT / "sweeps" / "scaling.yaml"
SMOKE = ROOT / "sweeps" / "smoke.yaml"


@pytest.mark.parametrize(
    "words", [(), ("ladder=nano",), ("ladder=evening",), ("ladder=pile", "corpus=pile")]
)
def test_every_shipped_ladder_expands(words: tuple[str, ...]) -> None:
    sweep = read_sweep_file(SCALING, words)
    assert len({e.folder_name for e in sweep.experiments}) == len(sweep.experiments) > 0


def test_the_default_study_is_the_one_that_is_described() -> None:
    sweep = read_sweep_file(SCALING, ())
    own = [e for e in sweep.experiments if not e.probe]
    assert len(own) == 72
    assert len(trunks_of(own)) == 5 * 2 * 2 + 2 * 2
    assert {e.run.budget.tokens for e in own} == {720_896, 1_081_344, 1_441_792}
    assert len(sweep.experiments) - len(own) == 2 * 2 * 3


@pytest.mark.parametrize(
    "words", [(), ("ladder=nano",), ("ladder=evening",), ("ladder=pile", "corpus=pile")]
)
def test_no_horizon_is_longer_than_an_epoch(words: tuple[str, ...]) -> None:
    for experiment in read_sweep_file(SCALING, words).experiments:
        corpus = experiment.run.corpus
        assert experiment.run.budget.tokens <= corpus.epoch_blocks * corpus.block_tokens


def test_arms_of_a_rung_share_everything_but_the_model() -> None:
    sweep = read_sweep_file(SCALING, ())
    shared = {}
    for e in sweep.experiments:
        run = e.run
        key = (run.rung, run.budget.tokens, run.seed, run.corpus.name)
        optimizer = replace(run.optimizer, learning_rate=1.0)
        facts = (optimizer, run.schedule, run.precision, run.nominal_parameters, e.execution)
        assert e.probe or shared.setdefault(key, facts) == facts


def test_an_arm_has_one_rate_at_a_rung_whatever_the_corpus_and_seed() -> None:
    rates: dict[tuple, float] = {}
    for e in read_sweep_file(SCALING, ()).experiments:
        key = (e.run.architecture, e.run.rung)
        rate = e.run.optimizer.learning_rate
        assert e.probe or rates.setdefault(key, rate) == rate
    assert len(set(rates.values())) == len(rates) == 10


def seeds_of(*words: str) -> set[tuple[int, int]]:
    experiments = read_sweep_file(SCALING, words).experiments
    return {(e.run.seed, e.run.corpus.shuffle_seed) for e in experiments}


def test_a_seed_changes_weights_and_order_unless_they_are_crossed() -> None:
    none = "ladders.default.replicates=null"
    seeds = "ladders.default.seeds=[17,18]"
    assert seeds_of() == {(17, 17), (18, 18)}
    assert seeds_of(none, seeds) == {(17, 17), (18, 18)}
    crossed = {(weights, order) for weights in (17, 18) for order in (3, 4)}
    assert seeds_of(none, seeds, "ladders.default.order_seeds=[3,4]") == crossed
    one_order = "ladders.default.replicates.order_seeds=[17]"
    assert seeds_of(one_order) == {(17, 17), (18, 17)}
    assert (17, 5) in seeds_of("also=[{order_seed: 5, rung: 10k}]")


def test_expanding_twice_gives_the_same_ids() -> None:
    first, second = (read_sweep_file(SCALING, ()) for _ in range(2))
    assert [run_id(e.run) for e in first.experiments] == [run_id(e.run) for e in second.experiments]


def test_a_model_override_reaches_the_blocks_that_have_it() -> None:
    sweep = read_sweep_file(SCALING, ["ladder=nano", "model.blocks.m.mixer.d_state=8"])
    states = {
        e.run.model.blocks["m"].mixer.d_state
        for e in sweep.experiments
        if e.run.architecture == "mamba"
    }
    assert states == {8}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ladder=evning", "unknown ladder 'evning'; did you mean 'evening'"),
        ("laddder=nano", "unknown key laddder; did you mean 'ladder'"),
        ("launcher.clustr=slurm", "unknown key launcher.clustr; did you mean 'cluster'"),
        ("ladders.default.rungs=[10k,12k]", "unknown rung '12k'"),
        ("model.blocks.q.mixer.d_state=8", "unknown key model.blocks.q"),
        ("model.blocks.m.mixer.d_stat=8", "did you mean 'd_state'"),
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat"),
        ("execution.rnks=2", "unknown key execution.rnks; did you mean 'ranks'"),
        ("architectures=[transformer,manba]", "unknown architecture 'manba'"),
        ("exclude=[{rungs: 10k}]", "unknown axis 'rungs'; did you mean 'rung'"),
    ],
)
def test_what_is_misspelt_is_named_with_what_was_meant(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"sweeps/scaling\.yaml") as raised:
        read_sweep_file(SCALING, [word])
    assert message in str(raised.value)


def test_an_excluded_cell_is_left_out() -> None:
    words = ["exclude=[{rung: 300k, architecture: mamba}]"]
    kept = {(e.run.rung, e.run.architecture) for e in read_sweep_file(SCALING, words).experiments}
    assert ("300k", "mamba") not in kept
    assert ("300k", "transformer") in kept


def test_the_smoke_sweep_repeats_one_run_on_two_processes() -> None:
    repeats = [e for e in read_sweep_file(SMOKE, ()).experiments if e.label]
    assert len({e.run_id for e in repeats}) == 1
    assert {(e.execution.ranks, e.execution.zero_stage) for e in repeats} == {(1, 0), (2, 2)}
    two = next(e for e in repeats if e.execution.ranks == 2)
    assert two.run.batch_sequences > 2 * (two.execution.micro_batch_sequences or 0)


MORE = "optimizer.weight_decay=0.2"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["ladders.evening.seeds=[1]"], "ladder=evening"),
        (["corpora.pile.epoch_blocks=8"], "corpus=pile"),
        (["launcher.partition=gpu"], "launcher.cluster=slurm"),
        (["launcher.cluster=slurm", "launcher.slots=2"], "launcher.cluster=local"),
        (["launcher.cluster=inline", "launcher.slots=2"], "launcher.cluster=local"),
        (["optimizer.batch_tokens=4096", "ladders.default.batch_tokens=2048"], "gives way"),
        (["schedule.warmup_tokens=0", "ladders.default.warmup_tokens=2048"], "gives way"),
        (
            [
                "ladder=nano",
                "optimizer.learning_rate=0.1",
                "ladders.nano.learning_rate.coefficient=0.1",
            ],
            "optimizer.learning_rate",
        ),
        (
            [
                "ladder=nano",
                "optimizer.learning_rate=0.1",
                "ladders.nano.learning_rate_factors=[1.0,2.0]",
            ],
            "optimizer.learning_rate",
        ),
        (
            ["ladder=nano", "execution.ranks=2", "ladders.nano.execution.ranks=1"],
            "execution.ranks",
        ),
        (["model.tied=false", "ladders.default.model={tied: true}"], "model.tied"),
        (["corpora.embedded.mixtures.mostly_python_repeated.unique_bytes=1"], "not trained on"),
        (["ladder=evening", "corpora.embedded.epoch_blocks=8192"], "gives way"),
        (["exclude=[{rung: 98k}]"], "matches no run"),
        (["exclude=[{rung: 68k}, {horizon: 5}]"], "matches no run"),
        (["exclude=[{}]"], "is empty"),
        (["exclude=[{rung: []}]"], "empty list"),
        (["also=[{}]"], "is empty"),
        (["also=[{rung: 20k, execution: {threads: 2}}]"], "a label of its own"),
        (["ladders.default.horizons=[450560,450561]"], "the same number of batches"),
    ],
)
def test_an_override_that_would_change_nothing_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=r"sweeps/scaling\.yaml") as raised:
        read_sweep_file(SCALING, [MORE, *words])
    assert key in str(raised.value)


def test_a_horizon_that_is_excluded_is_left_out() -> None:
    kept = read_sweep_file(SCALING, ["ladder=nano", "exclude=[{horizon: 450560, rung: 10k}]"])
    left = {(e.run.rung, e.run.budget.tokens) for e in kept.experiments}
    assert left == {("10k", 225_280), ("20k", 225_280), ("20k", 450_560)}


@pytest.mark.parametrize(
    "entry", ["text", "3", "{seed: text}", "{horizon: x}", "{rung: 3}", "{execution: 3}", "[a]"]
)
def test_an_entry_of_also_of_another_type_is_refused_by_its_key(entry: str) -> None:
    with pytest.raises(ConfigError, match="also"):
        read_sweep_file(SCALING, ["ladder=nano", f"also=[{entry}]"])
    with pytest.raises(ConfigError, match="also"):
        read_sweep_file(SCALING, ["ladder=nano", f"also={entry}"])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_each_horizon_is_trained_alone_where_its_rate_falls_from_the_warm_up_on(
    kind: str,
) -> None:
    shared = read_sweep_file(SMOKE, ()).experiments
    alone = read_sweep_file(SMOKE, [f"schedule.kind={kind}"]).experiments
    assert len(alone) == len(shared)
    assert not {e.run_id for e in alone} & {e.run_id for e in shared}
    plain = [e for e in alone if not e.label]
    trunks = trunks_of(plain)
    assert len(trunks) == len(plain)
    assert set(trunks.values()) == {None}


def test_the_plan_counts_every_token_of_horizons_that_are_trained_alone(tmp_path: Path) -> None:
    sweep = read_sweep_file(SMOKE, ["schedule.kind=cosine", "also=[]", "exclude=[]"])
    plan = make_plan(sweep, tmp_path)
    assert sum(unit.tokens for unit in plan.units) == sum(
        e.run.budget.tokens for e in sweep.experiments
    )
