"""Ids outlive the schema: a key that came later leaves them alone until it says something new."""

from pathlib import Path
from types import MappingProxyType

import pytest

import trainer.identity
from sweeps.grammar import read_sweep_file
from tests.trainer.conftest import PLAIN
from trainer.config import RunConfig
from trainer.identity import LATER_KEYS, config_hash
from trainer.ids import run_id, trunk_id
from trainer.schema import dump, load

SWEEPS = Path(__file__).parents[2] / "sweeps"
PINNED = {
    ("smoke.yaml", "ladders.default.precision=fp32"): {
        ("transformer", "mostly_python", "10k", 40960): ("9a58f3ba5b72", "trunk-82e60f9b8fa3"),
        ("transformer", "mostly_cpp", "20k", 163840): ("3ee3f1c106f5", "trunk-81b4043e21a1"),
        ("mamba", "mostly_python", "20k", 81920): ("ea007076fd8e", "trunk-1cea715bbcf5"),
        ("mamba", "mostly_cpp", "20k", 163840): ("2a18d9c495fc", "trunk-3a3704663ba7"),
    },
    ("scaling.yaml", "ladder=nano", "ladders.nano.precision=fp32"): {
        ("transformer", "mostly_python", "10k", 225280): ("5e20a54af6c2", "trunk-0308b7a099b1"),
        ("mamba", "mostly_cpp", "20k", 450560): ("5e83ed4dc399", "trunk-4e2e2b1df958"),
    },
}
"""Ids of the first records, by sweep and by what sets a run apart in it."""


@pytest.mark.parametrize("sweep", PINNED, ids=lambda words: words[0])
def test_runs_of_shipped_sweeps_keep_their_ids(sweep: tuple[str, ...]) -> None:
    file, *overrides = sweep
    found = {}
    for each in read_sweep_file(SWEEPS / file, overrides).experiments:
        run = each.run
        place = (run.architecture, run.corpus.name, run.rung, run.budget.tokens)
        found[place] = (each.run_id, each.trunk_id)
    assert {place: found[place] for place in PINNED[sweep]} == PINNED[sweep]


def test_a_later_key_is_hashed_only_where_it_changes_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {"seed": 1, "optimizer": {"beta1": 0.9}}
    later = {"optimizer.beta3": None, "noise": 0.0}
    monkeypatch.setattr(trainer.identity, "LATER_KEYS", MappingProxyType(later))
    unchanged = {"seed": 1, "noise": 0.0, "optimizer": {"beta1": 0.9, "beta3": None}}
    assert config_hash(unchanged) == config_hash(before)
    for other in (
        {**unchanged, "noise": 0.1},
        {**unchanged, "optimizer": {"beta1": 0.9, "beta3": 0.5}},
        {**unchanged, "beta3": None},
        {"seed": 1, "noise": 0.0, "optimizer": {"beta3": None}},
    ):
        assert config_hash(other) != config_hash(before)


def test_the_list_of_later_keys_states_their_defaults() -> None:
    plain = dump(load(RunConfig, PLAIN))
    for path, before in LATER_KEYS.items():
        value: object = plain
        for part in path.split("."):
            assert isinstance(value, dict), path
            value = value[part]
        assert value == before, path
        assert type(value) is type(before), path


def test_a_plain_run_keeps_its_ids() -> None:
    run = load(RunConfig, PLAIN)
    assert (run_id(run), trunk_id(run)) == ("45b9d921296e", "trunk-85b4ca0654fe")
