"""Tuned rules, searches over batches, and the probes of a study's own tuning."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import make_plan
from launch.study_folder import describe
from launch.tuning_plan import tuning_lines
from sweeps import architecture as architectures
from sweeps.grammar import Experiment, read_sweep_file, trunks_of
from sweeps.tuning_rule import Exponents, Place, TuningRule
from trainer.schema import ConfigError

SCALING = Path(__file__).parent.parent.parent / "sweeps" / "scaling.yaml"
PROBES = "ladders.nano.tuning_probes={rungs: [20k]}"
RULE = TuningRule(
    search="search 0123456789ab",
    learning_rate=0.004,
    pivot=Place(10_000, 300_000, 1024),
    exponents=Exponents(-0.5, -0.25, 0.5),
    log2_error=0.1,
    parameters=(9_000, 20_000),
    tokens=(225_280, 450_560),
    batch_tokens=(512, 2048),
)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        name: replace(a, tuning=RULE) for name, a in architectures.read_architectures().items()
    }
    monkeypatch.setattr(architectures, "_architectures", known)


def expand(*words: str) -> list[Experiment]:
    return list(read_sweep_file(SCALING, ("ladder=nano", *words)).experiments)


def test_a_rule_is_a_product_of_powers() -> None:
    assert RULE.at(RULE.pivot) == pytest.approx(0.004)
    place = Place(40_000, 4_800_000, 4096)
    assert RULE.at(place) == pytest.approx(0.004 * 0.5 * 0.5 * 2.0, rel=1e-12)


def test_what_lies_outside_a_search_is_named() -> None:
    assert RULE.outside(Place(9_500, 300_000, 512)) == []
    found = RULE.outside(Place(97_000, 1e7, 64))
    assert [line.split()[0] for line in found] == ["N", "tokens", "batch"]


def test_a_ladder_without_a_rate_asks_each_architectures_rule(tuned: None) -> None:
    for e in expand("ladders.nano.learning_rate=null"):
        tokens = math.sqrt(225_280 * 450_560)
        place = Place(e.run.nominal_parameters, tokens, 2048)
        assert e.run.optimizer.learning_rate == pytest.approx(RULE.at(place), rel=1e-12)
        assert e.run.optimizer.learning_rate_scale == 1.0


def test_horizons_with_a_tuned_rate_still_share_a_trunk(tuned: None) -> None:
    trunks = trunks_of(expand("ladders.nano.learning_rate=null"))
    assert all(trunk is not None and len(trunk.forks) == 2 for trunk in trunks.values())


def test_horizons_that_share_no_trunk_take_the_rate_of_their_own(tuned: None) -> None:
    for e in expand("ladders.nano.learning_rate=null", "schedule.kind=cosine"):
        place = Place(e.run.nominal_parameters, e.run.budget.tokens, 2048)
        assert e.run.optimizer.learning_rate == pytest.approx(RULE.at(place), rel=1e-12)


def test_a_ladder_without_a_rate_needs_a_rule() -> None:
    with pytest.raises(ConfigError, match="no tuning rule; give"):
        expand("ladders.nano.learning_rate=null", "architectures=[identity]")


def test_a_search_crosses_rates_and_batches() -> None:
    runs = expand(
        "ladders.nano.learning_rate_factors=[0.5,1]",
        "ladders.nano.batch_factors=[0.5,2]",
        "architectures=[mamba]",
    )
    batches = {e.run.optimizer.batch_tokens for e in runs}
    rates = {e.run.optimizer.learning_rate for e in runs if e.run.rung == "10k"}
    assert batches == {1024, 4096}
    assert len(rates) == 2
    assert len(runs) == 2 * 2 * 2 * 2 * 2


def test_a_batch_of_part_of_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a whole number of sequences of 256"):
        expand("ladders.nano.batch_factors=[0.3]")


def test_probes_vary_one_choice_of_one_run(tuned: None) -> None:
    runs = expand(PROBES, "ladders.nano.learning_rate=null")
    probes = [e for e in runs if e.probe]
    assert len(probes) == 2 * 4
    for e in probes:
        assert (e.run.rung, e.run.corpus.name, e.run.seed) == ("20k", "mostly_python", 17)
        own = next(
            o.run
            for o in runs
            if not o.probe
            and (o.run.architecture, o.run.rung, o.run.corpus, o.run.budget)
            == (e.run.architecture, e.run.rung, e.run.corpus, e.run.budget)
        )
        assert own.budget.tokens == 450_560
        assert e.run.model == own.model
        assert e.probe is not None
        batch = e.probe.batch_factor
        # The rule knows the batch: its rate follows by the square root.
        wanted = e.probe.learning_rate_factor * math.sqrt(batch)
        assert e.run.optimizer.batch_tokens == own.optimizer.batch_tokens * batch
        ratio = e.run.optimizer.learning_rate / own.optimizer.learning_rate
        assert ratio == pytest.approx(wanted, rel=1e-9)


def test_a_ladders_own_rule_knows_no_batch() -> None:
    probes = [e for e in expand(PROBES) if e.probe and e.probe.batch_factor != 1]
    assert len({e.run.optimizer.learning_rate for e in probes}) == 1


def test_a_study_folder_lists_probes_apart(tmp_path: Path) -> None:
    sweep = read_sweep_file(SCALING, ("ladder=nano", PROBES))
    stored = describe(make_plan(sweep, tmp_path))
    plain = describe(make_plan(read_sweep_file(SCALING, ("ladder=nano",)), tmp_path))
    assert stored["runs"] == plain["runs"]
    assert stored["id"] != plain["id"]
    assert set(stored["probes"]) == {e.folder_name for e in sweep.experiments if e.probe}
    assert {tuple(each.values()) for each in stored["probes"].values()} == {
        (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rungs", "probed"),
    [
        ("[smallest, middle]", {"10k", "20k"}),
        ("[largest]", {"68k"}),
        ("[largest, 68k]", {"68k"}),
        ("[middle]", {"20k"}),
    ],
)
def test_probed_rungs_go_by_name_or_by_place(rungs: str, probed: set[str]) -> None:
    words = ["ladders.nano.rungs=[68k, 10k, 31k, 20k]", "architectures=[mamba]"]
    runs = expand(*words, f"ladders.nano.tuning_probes={{rungs: {rungs}}}")
    assert {e.run.rung for e in runs if e.probe} == probed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ladders.nano.tuning_probes={rungs: [97k]}"], "which the ladder does not train"),
        (["ladders.nano.tuning_probes={rungs: []}"], "is empty"),
        ([PROBES, "ladders.nano.learning_rate_factors=[1,2]"], "make the sweep a search"),
        ([PROBES, "optimizer.learning_rate=0.01"], "leaves no place for tuning_probes"),
        ([PROBES, "optimizer.batch_tokens=512"], "leaves no place for tuning_probes"),
        (
            ["ladders.nano.tuning_probes={rungs: [20k], batch_factors: [1, 2]}"],
            "which is the study's own run",
        ),
        (
            ["ladders.nano.tuning_probes={rungs: [20k], learning_rate_factors: [-1]}"],
            "is outside 0 to 1e18",
        ),
    ],
)
def test_probes_that_check_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(*words)


def test_a_plan_says_where_rates_come_from(tuned: None, tmp_path: Path) -> None:
    def lines(*words: str) -> str:
        sweep = read_sweep_file(SCALING, ("ladder=nano", *words))
        return "\n".join(tuning_lines(make_plan(sweep, tmp_path)))

    assert "by the ladder's rule" in lines()
    assert "no tuning probes" in lines()
    tuned_lines = lines("ladders.nano.learning_rate=null", PROBES)
    assert "by its own rule (search search 0123456789ab)" in tuned_lines
    assert "tuning probes: 8 runs" in tuned_lines
    assert "outside the search" not in tuned_lines
    far = lines("ladders.nano.learning_rate=null", "ladders.nano.rungs=[10k, 97k]")
    assert "outside the search at 97k: N 9.75e+04 (searched 9e+03 to 2e+04)" in far
    # Each budget counts, not the mean of those that share a trunk.
    long = lines("ladders.nano.learning_rate=null", "ladders.nano.horizons=[225280, 901120]")
    assert "outside the search at 10k: tokens 9.01e+05 (searched 2.25e+05 to 4.51e+05)" in long
    assert lines("ladders.nano.learning_rate_factors=[1,2]") == ""


def test_a_batch_of_less_than_a_block_is_refused_by_the_plan() -> None:
    with pytest.raises(ConfigError, match=r"256 is 1 sequences, but each rank reads whole blocks"):
        expand("ladders.nano.batch_tokens=512", PROBES)
