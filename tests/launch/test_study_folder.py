"""One folder holds one study: another of the same name is refused, or takes its place in words."""

from pathlib import Path

import pytest

from analysis.tables.sweep_folder import load
from launch.plan import Plan, make_plan
from launch.study_folder import describe, earlier_study, hold, write_study
from launch.sweep import main
from sweeps.grammar import read_sweep_file
from trainer.schema import ConfigError, read_yaml

SMOKE = "sweeps/smoke.yaml"
SAME = [
    ["launcher.slots=2"],
    ["execution.threads=2"],
    ["evaluation.batch_sequences=4"],
    ["architectures=[mamba,transformer]"],
]
OTHER = [
    ["architectures=[transformer]"],
    ["optimizer.weight_decay=0.2"],
    ["ladders.default.horizons=[40960]"],
    ["evaluation.blocks_per_set=4"],
    ["ladders.default.evaluation.milestones=[40960]"],
    ["corpora.embedded.neutral_set=python"],
    ["baselines=[2]"],
    ["also=[]"],
]


def plan_of(*words: str) -> Plan:
    return make_plan(read_sweep_file(Path(SMOKE), words), Path("nowhere"))


@pytest.fixture(scope="module")
def usual() -> Plan:
    return plan_of()


@pytest.mark.parametrize("words", SAME, ids=str)
def test_a_study_keeps_its_id_however_it_is_executed(usual: Plan, words: list[str]) -> None:
    assert describe(plan_of(*words))["id"] == describe(usual)["id"]


@pytest.mark.parametrize("words", OTHER, ids=str)
def test_another_expansion_is_another_study_and_keeps_both_reports(
    usual: Plan, words: list[str], tmp_path: Path
) -> None:
    first, plan = describe(usual), plan_of(*words)
    second = describe(plan)
    assert second["id"] != first["id"]
    write_study(tmp_path, usual, first)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("of the first")
    change = earlier_study(tmp_path, second)
    assert first["id"] in change
    assert second["id"] in change
    assert words[0].partition("=")[0].split(".")[-1] in change
    write_study(tmp_path, plan, second)
    kept = tmp_path / "earlier" / first["id"]
    assert (kept / "report" / "index.html").read_text() == "of the first"
    assert read_yaml(kept / "sweep.yaml")["id"] == first["id"]
    assert read_yaml(tmp_path / "sweep.yaml")["id"] == second["id"]
    assert not (tmp_path / "report").exists()
    assert not earlier_study(tmp_path, second)
    assert len(load(tmp_path).runs) == len(second["runs"])


def test_going_to_and_fro_keeps_the_newest_report_of_each(usual: Plan, tmp_path: Path) -> None:
    other = plan_of("architectures=[mamba]")
    for turn, plan in enumerate((usual, other, usual, other)):
        write_study(tmp_path, plan, describe(plan))
        (tmp_path / "report").mkdir(exist_ok=True)
        (tmp_path / "report" / "index.html").write_text(str(turn))
    kept = tmp_path / "earlier" / describe(usual)["id"] / "report" / "index.html"
    assert kept.read_text() == "2"


def test_a_kill_while_a_study_is_set_aside_loses_nothing(usual: Plan, tmp_path: Path) -> None:
    write_study(tmp_path, usual, describe(usual))
    aside = tmp_path / "earlier" / describe(usual)["id"]
    aside.mkdir(parents=True)
    (aside / "report").mkdir()
    (aside / "report" / "index.html").write_text("moved before the kill")
    other = plan_of("architectures=[mamba]")
    write_study(tmp_path, other, describe(other))
    assert (aside / "report" / "index.html").read_text() == "moved before the kill"
    assert (aside / "sweep.yaml").exists()


def test_two_studies_cannot_hold_one_folder_at_once(tmp_path: Path) -> None:
    with hold(tmp_path, "first"):
        with hold(tmp_path, "first"):
            pass
        with pytest.raises(ConfigError, match=r"another command trains study first.*name="):
            hold(tmp_path, "second").__enter__()
    with hold(tmp_path, "second"):
        pass


def test_a_second_study_at_once_is_refused_before_anything_is_built(
    usual: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = tmp_path / "runs", tmp_path / "data"
    words = ["--runs", str(runs), f"execution.data_root={data}"]
    with hold(runs / "smoke", describe(usual)["id"]):
        assert main([SMOKE, "architectures=[mamba]", *words]) == 64
    assert "another command trains study" in capsys.readouterr().out
    assert not data.exists()


def test_the_plan_says_what_a_narrower_command_would_replace(
    usual: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study_in = tmp_path / "smoke"
    write_study_in.mkdir()
    write_study(write_study_in, usual, describe(usual))
    assert main([SMOKE, "architectures=[mamba]", "also=[]", "--plan", "--runs", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "has 12 of them, adds 0 and leaves out 14" in printed
    assert "architectures" in printed
    assert read_yaml(write_study_in / "sweep.yaml")["id"] == describe(usual)["id"]


@pytest.mark.parametrize("text", ["{}", "runs: 3", "config: {}", "config: 3\nruns: []"])
def test_a_sweep_yaml_that_is_none_is_one_clear_message(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "sweep.yaml").write_text(text)
    assert main([SMOKE, "--status", "--runs", str(tmp_path)]) == 64
    assert "describes no study" in capsys.readouterr().out
