"""Recipes as arms of a sweep: what they change, what they share, and how they fail."""

from pathlib import Path

import pytest

from launch.plan import make_plan
from launch.study_folder import describe
from launch.tuning_plan import tuning_lines
from sweeps.grammar import Experiment, read_sweep_file
from trainer.schema import ConfigError, dump

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "sweeps" / "recipes.yaml"
SMOKE = ROOT / "sweeps" / "smoke.yaml"
MUON = "recipes={adamw: {}, muon: {optimizer: {kind: muon}}}"


def by_arm(experiments: tuple[Experiment, ...]) -> dict[str, list[Experiment]]:
    found: dict[str, list[Experiment]] = {}
    for each in experiments:
        found.setdefault(each.run.architecture, []).append(each)
    return found


def test_every_recipe_is_an_arm_of_every_architecture() -> None:
    sweep = read_sweep_file(RECIPES, ())
    arms = by_arm(sweep.experiments)
    names = [name for name in sweep.config.recipes if name != "adamw"]
    assert set(arms) == {
        " ".join((architecture, name)).strip()
        for architecture in sweep.config.architectures
        for name in ("", *names)
    }
    assert {len(runs) for runs in arms.values()} == {len(arms["transformer"])}


def test_recipes_change_what_they_say_and_nothing_else() -> None:
    arms = by_arm(read_sweep_file(RECIPES, ()).experiments)
    own = arms["transformer"][0].run
    changes = {
        "muon": {"optimizer.kind": "muon"},
        "cosine": {"schedule.kind": "cosine"},
        "sqrt-decay": {"schedule.decay_shape": "sqrt"},
        "z-loss": {"z_loss": 0.0001},
        "averaged": {"optimizer.ema_decay": 0.95},
        "lion": {
            "optimizer.kind": "lion",
            "optimizer.beta1": 0.95,
            "optimizer.beta2": 0.98,
            "optimizer.learning_rate": 0.2 * own.optimizer.learning_rate,
        },
    }
    for name, wanted in changes.items():
        run = arms[f"transformer {name}"][0].run
        found = differences(dump(own), dump(run))
        assert found.pop("architecture") == f"transformer {name}"
        assert found == wanted, name


def differences(old: dict, new: dict, above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in new.items():
        if isinstance(value, dict):
            found |= differences(old[key], value, f"{above}{key}.")
        elif value != old[key]:
            found[f"{above}{key}"] = value
    return found


def test_an_empty_recipe_is_the_sweeps_own_run() -> None:
    also = ("also=[]",)
    own = {e.run_id for e in read_sweep_file(SMOKE, also).experiments}
    both = read_sweep_file(SMOKE, (*also, MUON)).experiments
    arms = by_arm(both)
    assert len(both) == 2 * len(own)
    assert {e.run_id for name in ("transformer", "mamba") for e in arms[name]} == own


def test_recipes_can_be_left_out_by_name() -> None:
    words = ("also=[]", MUON, "exclude=[{recipe: muon, architecture: mamba}]")
    assert set(by_arm(read_sweep_file(SMOKE, words).experiments)) == {
        "transformer",
        "transformer muon",
        "mamba",
    }


def test_a_search_of_one_recipe_is_no_evidence_for_another(tmp_path: Path) -> None:
    plan = make_plan(read_sweep_file(SMOKE, ("also=[]", MUON)), tmp_path)
    tuning = describe(plan)["tuning"]
    assert tuning["mamba"]["evidence"]
    assert tuning["mamba muon"] == {**tuning["mamba"], "evidence": ""}
    lines = "\n".join(tuning_lines(plan))
    assert "mamba muon: " in lines
    assert "no search of its recipe" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes={a: {optimizer: {learning_rate: 0.1}}}"], "the sweep gives it"),
        (["recipes={a: {optimizer: {batch_tokens: 512}}}"], "the sweep gives it"),
        (["recipes={a: {optimizer: {kid: muon}}}"], "did you mean 'kind'"),
        (["recipes={a: {optimiser: {kind: muon}}}"], "did you mean 'optimizer'"),
        (["recipes={a: {learning_rate_factor: 0}}"], "learning_rate_factor 0.0 is not above 0"),
        (
            ["recipes={a: {learning_rate_factor: 2}}", "optimizer.learning_rate=0.1"],
            "fixes the rate of all runs",
        ),
        (
            ["recipes={a: {schedule: {kind: cosine}}}", "schedule.decay_fraction=0.3"],
            "but kind cosine decays from",
        ),
        ([MUON, "also=[{recipe: moun}]"], "did you mean 'muon'"),
        (["also=[{recipe: muon}]"], "unknown recipe 'muon'"),
        (["recipes={'a\\nb': {z_loss: 0.1}}"], "is no name"),
        ([MUON, "execution.zero_stage=1"], "muon needs whole matrices"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_trained_is_refused(words: list[str], message: str) -> None:
    also = [] if any(word.startswith("also=") for word in words) else ["also=[]"]
    with pytest.raises(ConfigError, match=message):
        read_sweep_file(SMOKE, [*also, *words])
