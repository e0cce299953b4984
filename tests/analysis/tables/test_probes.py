"""Probes are read beside the run that each is compared with, and are no rows of the study."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.tables.run_table import Table, final
from analysis.tables.sweep_folder import load
from tests.analysis.synthetic_study import Study, write
from trainer.record import RunRecord, read_json

STUDY = Study(
    sizes={"r9k": 9e3, "r30k": 3e4}, horizons=(4.5e5, 9e5), seeds={"r30k": (0, 1)},
    probed=("r9k", "r30k"), seed_sd=0.0, point_sd=0.0, optimum={"mamba": (1.0, -1.0)},
)  # fmt: skip


def written(root: Path, **changes: object) -> Table:
    return load(write(replace(STUDY, **changes), root / "study", np.random.default_rng(0)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return written(tmp_path_factory.mktemp("runs"))


def test_every_probe_is_a_row_beside_the_run_that_it_is_compared_with(table: Table) -> None:
    probes = table.probes
    assert len(probes) == 2 * 2 * 4
    assert set(probes["status"]) == {"done"}
    runs = table.runs.set_index("run_id")
    for probe in probes.to_dict("records"):
        own = runs.loc[probe["compared_with"]]
        for name in ("architecture", "rung", "corpus", "seed", "horizon_tokens"):
            assert own[name] == probe[name]
        assert probe["learning_rate"] == own["learning_rate"] * probe["learning_rate_factor"]
        assert probe["batch_tokens"] == 4096 * probe["batch_factor"]
        # The closed form of the synthetic truth: a parabola in log2 of the factors.
        rate, batch = np.log2([probe["learning_rate_factor"], probe["batch_factor"]])
        best = np.array(STUDY.optimum.get(str(probe["architecture"]), (0.0, 0.0)))
        change = STUDY.curvature * (((np.array([rate, batch]) - best) ** 2).sum() - best @ best)
        assert np.log(probe["loss_nats"] / probe["loss_in_use"]) == pytest.approx(change)


def test_probes_change_nothing_else_of_a_study(table: Table, tmp_path: Path) -> None:
    without = written(tmp_path, probed=())
    assert not len(without.probes)
    assert table.exclusions == ()
    for name in ("rows", "runs", "training"):
        assert getattr(table, name).equals(getattr(without, name))
    assert set(table.probes["run_id"]).isdisjoint(final(table).rows["run_id"])


def test_a_probe_of_another_batch_may_end_less_than_a_batch_later(tmp_path: Path) -> None:
    table = written(tmp_path)
    name = table.probes["run_id"].iloc[0]
    root = tmp_path / "study"
    config = yaml.safe_load((root / name / "config.yaml").read_text())
    for longer, found in ((4095, True), (4096, False)):
        config["budget"]["tokens"] = 900_000 + longer
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        partner = load(root).probes.set_index("run_id")["compared_with"][name]
        assert bool(partner) == found


def test_probes_that_are_not_done_are_listed_with_their_state(tmp_path: Path) -> None:
    states = {0: "diverged", 1: "not started", 2: "failed", 3: "running"}
    table = written(tmp_path, probe_state=states)
    assert table.probes["status"].tolist()[:4] == list(states.values())
    assert table.probes["loss_nats"].isna().tolist()[:5] == [True] * 4 + [False]
    assert {each.kind for each in table.exclusions} == {
        "diverged", "not started", "failed", "unfinished",
    }  # fmt: skip


def test_damage_and_other_data_set_a_probe_aside(tmp_path: Path) -> None:
    table = written(tmp_path)
    root, (damaged, other) = tmp_path / "study", table.probes["run_id"].tolist()[:2]
    (root / damaged / "config.yaml").write_text("[1, 2]\n")
    stored = read_json(sorted((root / other).glob("provenance*.json"))[-1])
    with closing(RunRecord(root / other)) as record:
        record.write_provenance({**stored, "dataset_root_hash": "d1"})
    probes = load(root).probes.set_index("run_id")
    assert probes.loc[[damaged, other], "status"].tolist() == ["damaged", "other-data"]
    assert probes.loc[[damaged, other], "loss_nats"].isna().all()
    assert {(each.run_id, each.kind) for each in load(root).exclusions} == {
        (damaged, "damaged"), (other, "other-data"),
    }  # fmt: skip


def test_a_probe_measured_by_another_evaluation_has_no_loss(tmp_path: Path) -> None:
    table = written(tmp_path)
    name = table.probes["run_id"].iloc[0]
    file = tmp_path / "study" / name / "evaluations.jsonl"
    file.write_text(file.read_text().replace('"e1"', '"e2"'))
    again = load(tmp_path / "study")
    assert np.isnan(again.probes.set_index("run_id")["loss_nats"][name])
    assert [(each.run_id, each.kind) for each in again.exclusions] == [(name, "evaluation")]


@pytest.mark.parametrize(
    "listed",
    [
        ["a"],
        {"a": 0.5},
        {"a": {"batch_factor": 2}},
        {"a": {"learning_rate_factor": -1, "batch_factor": 1}},
    ],
)
def test_a_list_of_probes_that_says_no_factors_is_refused(tmp_path: Path, listed: object) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": [], "probes": listed}))
    with pytest.raises(ValueError, match="lists its probes in a way that cannot be read"):
        load(tmp_path)
