"""The run table: columns, units, states, and what is left out."""

from contextlib import closing

import numpy as np
import pytest
import yaml

from analysis.tables.run_table import COLUMNS, final
from analysis.tables.sweep_folder import load
from analysis.validity.checks import repetition, tokenizers
from tests.analysis.synthetic_study import Study, write
from trainer.record import RunRecord, read_json


@pytest.fixture
def troubled(tmp_path):
    """A small sweep with one run in each state that is not done, and a stranger."""
    study = Study(
        sizes={"r9k": 9e3, "r30k": 3e4},
        seeds={},
        state={0: "diverged", 1: "running", 2: "failed", 3: "not started"},
    )
    root = write(study, tmp_path / "troubled", np.random.default_rng(0))
    with closing(RunRecord(root / "stranger")) as record:
        record.write_config({"architecture": "transformer"})
    return root


def test_table_has_the_documented_columns(sweep):
    assert list(load(sweep).rows.columns) == list(COLUMNS)


def test_counts_are_float64(sweep):
    rows = load(sweep).rows
    for name in ("parameters", "tokens", "flops", "total_nats", "targets", "state_bytes"):
        assert rows[name].dtype == np.float64


def test_flops_are_per_token_flops_times_tokens_in_each_convention(sweep, study):
    rows = load(sweep).rows
    mine = rows[rows["architecture"] == "mamba"]
    nominal = study.flops_factor["mamba"] * 1.02 * mine["nominal_parameters"] * mine["tokens"]
    np.testing.assert_allclose(mine["flops"], nominal, rtol=1e-12)
    np.testing.assert_allclose(mine["flops_full_attention"], 1.1 * nominal, rtol=1e-12)
    six_n = 6 * 0.8 * 1.02 * mine["nominal_parameters"] * mine["tokens"]
    np.testing.assert_allclose(mine["flops_six_n"], six_n, rtol=1e-12)
    np.testing.assert_allclose(mine["scan_flops"], 10 * mine["tokens"], rtol=1e-12)


def test_loss_is_nats_over_targets(sweep):
    rows = load(sweep).rows
    np.testing.assert_allclose(rows["loss_nats"], rows["total_nats"] / rows["targets"])
    np.testing.assert_allclose(rows["bits_per_byte"], rows["loss_nats"] / np.log(2), rtol=1e-12)


def test_final_keeps_one_decayed_point_per_run_and_set(sweep, study):
    table = load(sweep)
    rows = final(table).rows
    assert rows["decayed"].all()
    assert len(rows) == len(table.runs) * len(study.evaluation_sets)
    assert not rows.duplicated(["run_id", "evaluation_set"]).any()


def test_branches_of_a_trunk_share_their_cluster(sweep, study):
    rows = final(load(sweep)).rows
    assert (rows.groupby("trunk_id")["run_id"].nunique() == len(study.horizons)).all()


def test_every_run_that_is_not_used_is_listed_with_a_reason(troubled):
    table = load(troubled)
    found = {each.kind: each for each in table.exclusions}
    assert set(found) == {"diverged", "unfinished", "failed", "not started", "not in sweep"}
    assert found["not in sweep"].run_id == "stranger"
    assert "diverged at step" in found["diverged"].reason
    assert len(table.runs) == 24
    assert set(final(table).rows["status"]) == {"done"}


def test_trunks_are_not_reported_as_unfinished(sweep):
    assert load(sweep).exclusions == ()


def test_a_failed_evaluation_is_an_exclusion_and_not_a_point(sweep, tmp_path):
    study = Study(architectures=("a",), corpora=("c",), sizes={"s": 9e3}, seeds={})
    root = write(study, tmp_path / "failing", np.random.default_rng(0))
    run_id = yaml.safe_load((root / "sweep.yaml").read_text())["runs"][0]
    before = len(load(root).rows)
    row = {"step": 7, "tokens": 9, "evaluation_set": "prose", "evaluation_id": "e1"}
    with closing(RunRecord(root / run_id)) as record:
        record.append_evaluations([{**row, "decayed": False, "error": "out of memory"}])
    table = load(root)
    assert len(table.rows) == before
    assert "out of memory" in table.exclusions[0].reason


def test_runs_from_other_data_are_reported_and_not_used(tmp_path):
    study = Study(architectures=("a",), corpora=("c",), seeds={})
    root = write(study, tmp_path / "mixed", np.random.default_rng(0))
    run_id = yaml.safe_load((root / "sweep.yaml").read_text())["runs"][0]
    with closing(RunRecord(root / run_id)) as record:
        stored = {**_latest_start(root / run_id), "dataset_root_hash": "d1"}
        record.write_provenance(stored)
    table = load(root)
    assert [(each.run_id, each.kind) for each in table.exclusions] == [(run_id, "other-data")]
    assert run_id not in set(final(table).rows["run_id"])


def test_points_measured_by_another_evaluation_do_not_mix(tmp_path):
    study = Study(architectures=("a",), corpora=("c",), sizes={"s": 9e3}, seeds={})
    root = write(study, tmp_path / "swapped", np.random.default_rng(0))
    run_id = yaml.safe_load((root / "sweep.yaml").read_text())["runs"][0]
    with closing(RunRecord(root / run_id)) as record:
        record.append_evaluations([{
                "step": 1, "tokens": 1, "evaluation_set": "prose", "evaluation_id": "swap",
                "total_nats": 1.0, "targets": 1, "utf8_bytes": 1, "decayed": True,
            }])  # fmt: skip
    table = load(root)
    assert set(table.rows["evaluation_id"]) == {"e1"}
    assert [each.kind for each in table.exclusions] == ["evaluation"]


def test_a_folder_without_a_sweep_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds no sweep\.yaml; name a folder"):
        load(tmp_path)


def _latest_start(path):
    stored = read_json(path / "provenance.json")
    return {key: value for key, value in stored.items() if key not in ("starts", "incarnation")}


@pytest.mark.parametrize(("change", "code"), [({}, None), ({"kind": "bpe"}, "W-TOK")])
def test_arms_that_cut_text_otherwise_are_raised(tmp_path, change, code):
    root = write(Study(seeds={}, horizons=(4.5e5,)), tmp_path / "cut", np.random.default_rng(0))
    for run_id in yaml.safe_load((root / "sweep.yaml").read_text())["runs"]:
        config = yaml.safe_load((root / run_id / "config.yaml").read_text())
        own = change if config["architecture"] == "mamba" else {}
        config["corpus"]["tokenizer"] = {"kind": "bytes", "path": None, "vocab_size": None, **own}
        (root / run_id / "config.yaml").write_text(yaml.safe_dump(config))
    caveat = tokenizers(final(load(root)).rows)
    assert (caveat.code if caveat else None) == code


@pytest.mark.parametrize(("unique", "repeats"), [(1_800_000, False), (1_700_000, True)])
def test_training_past_the_unique_text_is_raised(tmp_path, unique, repeats):
    root = write(Study(seeds={}), tmp_path / "again", np.random.default_rng(0))
    for run_id in yaml.safe_load((root / "sweep.yaml").read_text())["runs"]:
        config = yaml.safe_load((root / run_id / "config.yaml").read_text())
        config["corpus"]["unique_bytes"] = unique
        (root / run_id / "config.yaml").write_text(yaml.safe_dump(config))
    assert (repetition(final(load(root)).rows) is not None) == repeats
