"""`python -m analysis.tuning`: what it reads, prints and writes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import analysis.tuning.__main__ as command
from sweeps.tuning_rule import Place, TuningRule
from tests.analysis.effects.test_tuning_rule import search, true_rate
from trainer.schema import load


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rules")
    trials = search(np.random.default_rng(8)).assign(run_id=lambda rows: rows.index.astype(str))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "read_trials", lambda _: trials)
        assert command.main(["runs/tuning", "--name", "tuning 0123", "--out", str(out)]) == 0
    return out


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
    assert len(pd.read_csv(written / "trials.csv")) == len(search(np.random.default_rng(8)))
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
