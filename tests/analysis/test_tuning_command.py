"""`python -m analysis.tuning`: what it reads, prints and writes."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import analysis.tuning.__main__ as command
from analysis.effects.seed_noise import ASSUMED_SEED_SD
from analysis.effects.tuning_rule import fit_rules
from analysis.tables.frames import where
from sweeps.tuning_rule import Place, TuningRule
from tests.analysis.effects.test_tuning_rule import search, true_rate
from trainer.schema import load


def with_a_slope(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials and those of an architecture whose loss rises with the rate wherever it is."""
    mine = where(trials, "architecture", "gentle")
    sloping = mine.assign(
        architecture="sloping",
        trunk_id="sloping-" + mine["trunk_id"],
        loss_nats=2.5 + 0.1 * np.log2(mine["learning_rate"] * 1e5) / 17,
    )
    return pd.concat([trials, sloping], ignore_index=True)


def run(trials: pd.DataFrame, *words: str) -> tuple[int, str]:
    """The command on made-up trials: its exit code and what it prints."""
    named, text = trials.assign(run_id=trials.index.astype(str)), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(text):
        patched.setattr(command, "read_trials", lambda _: named)
        code = command.main(["runs/tuning", *words])
    return code, text.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rules")
    trials = with_a_slope(search(np.random.default_rng(8)))
    code, text = run(trials, "--name", "tuning 0123", "--out", str(out))
    assert code == 0
    (out / "printed.txt").write_text(text)
    return out


def test_an_architecture_without_a_best_rate_leaves_the_others_their_rules(written: Path) -> None:
    alone = fit_rules(search(np.random.default_rng(8)), ASSUMED_SEED_SD, 0)
    entries = yaml.safe_load((written / "rules.yaml").read_text())
    for arm, value in zip(alone.architectures, alone.values, strict=True):
        assert entries[arm]["tuning"]["learning_rate"] == float(f"{2.0 ** value[0]:.4g}")
    printed = (written / "printed.txt").read_text()
    assert "no rule for sloping: in every cell its best trial is at the lowest rate" in printed


def test_a_search_of_no_other_architecture_gives_no_rule() -> None:
    trials = with_a_slope(search(np.random.default_rng(8)))
    code, text = run(where(trials, "architecture", "sloping"))
    assert code == 2
    assert "search lower rates" in text


def test_the_rules_are_what_an_architectures_file_takes(written: Path) -> None:
    entries = yaml.safe_load((written / "rules.yaml").read_text())
    assert set(entries) == {"steep", "gentle"}
    for arm, entry in entries.items():
        rule = load(TuningRule, entry["tuning"], arm)
        assert rule.search == "tuning 0123"
        assert rule.regret is not None
        assert rule.regret.rung == "160k"
        rate = np.log2(rule.at(Place(68_180, 901_120, 512)))
        assert abs(rate - true_rate(arm, 68_180, 901_120, 512)) < 3 * rule.log2_error


def test_every_trial_and_every_cells_regret_are_written(written: Path) -> None:
    assert len(pd.read_csv(written / "trials.csv")) == 1.5 * len(search(np.random.default_rng(8)))
    regret = pd.read_csv(written / "regret.csv")
    assert set(regret["rung"]) == {"20k", "68k", "160k"}
    assert (regret["low"] <= regret["percent"]).all()
    assert (written / "rate_search.png").stat().st_size > 10_000


def test_trials_are_the_finished_runs_of_a_sweep(sweep: Path) -> None:
    trials = command.read_trials([sweep, sweep])
    table = command.load(sweep)
    assert sorted(trials["run_id"]) == sorted(table.runs["run_id"])
    assert set(trials["batch_tokens"]) == set(table.rows["batch_tokens"])


def test_a_folder_that_is_no_sweep_is_named(tmp_path: Path, capsys) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no sweep.yaml" in capsys.readouterr().out.replace("\n", "")


def test_one_rate_for_every_cell_gives_no_rule(sweep: Path, capsys) -> None:
    assert command.main([str(sweep)]) == 2
    assert "no cell has two trials to fit" in capsys.readouterr().out.replace("\n", " ")
