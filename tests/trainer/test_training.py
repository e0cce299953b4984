"""Real training of tiny runs: what must be equal is equal bit for bit."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels.scans.selective_scan
from analysis.tables.document_losses import read_document_losses
from data_pipelines.evaluation_sets import evaluation_batches
from data_pipelines.manifest import read_manifest
from models.backbone import build_backbone
from models.sequences.whole import WholeSequence
from tests.trainer.study import MAMBA, at_budget, build_tiny, make, read_exact, run, trunk_of
from trainer.config import EvaluationConfig
from trainer.ids import evaluation_id
from trainer.objective import IGNORED, total_nats
from trainer.record import read_run
from trainer.schedule import decay_begins
from trainer.schema import ConfigError
from trainer.session import Lineage

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["transformer", "mamba"])
def arm(request: pytest.FixtureRequest) -> dict:
    return MAMBA if request.param == "mamba" else {}


def test_the_same_run_twice_is_bit_identical(root: Path, tmp_path: Path, arm: dict) -> None:
    for name in ("one", "two"):
        assert run(make(root, arm), tmp_path / name).state == "done"
    assert read_exact(tmp_path / "one") == read_exact(tmp_path / "two")


def test_recomputation_is_bit_identical(root: Path, tmp_path: Path, arm: dict) -> None:
    for name in ("kept", "anew"):
        assert run(make(root, arm, recompute=name == "anew"), tmp_path / name).state == "done"
    assert read_exact(tmp_path / "kept") == read_exact(tmp_path / "anew")


def test_training_lowers_the_loss(root: Path, tmp_path: Path, arm: dict) -> None:
    run(make(root, arm), tmp_path / "run")
    losses = [row["loss_nats"] for row in read_run(tmp_path / "run").metrics]
    assert losses[0] == pytest.approx(math.log(257), rel=0.02)
    assert losses[-1] < losses[0] - 1.0  # type: ignore[operator]


def test_a_branch_equals_its_horizon_trained_alone(root: Path, tmp_path: Path, arm: dict) -> None:
    alone = make(root, arm)
    longer = at_budget(alone, 20480)
    forks = frozenset({decay_begins(alone.run), decay_begins(longer.run)})
    trunk = at_budget(longer, max(forks) * 512)
    assert run(trunk, tmp_path / "trunk", Lineage(forks=forks)).state == "extended"
    run(alone, tmp_path / "branch", Lineage(trunk=tmp_path / "trunk"))
    run(alone, tmp_path / "alone")
    branch, whole = read_run(tmp_path / "branch"), read_run(tmp_path / "alone")
    assert branch.metrics[0]["step"] == decay_begins(alone.run) + 1
    assert branch.summary["parameters_sha256"] == whole.summary["parameters_sha256"]
    branch_rows, _, _ = read_exact(tmp_path / "branch")
    whole_rows, _, _ = read_exact(tmp_path / "alone")
    assert branch_rows == whole_rows[decay_begins(alone.run) :]
    assert branch.evaluations[-1]["total_nats"] == whole.evaluations[-1]["total_nats"]


def test_a_trunk_is_extended_for_a_later_horizon(root: Path, tmp_path: Path) -> None:
    short, trunk_folder = make(root), tmp_path / "trunk"
    first = frozenset({decay_begins(short.run)})
    run(trunk_of(short, max(first)), trunk_folder, Lineage(forks=first))
    longer = at_budget(short, 20480)
    both = first | {decay_begins(longer.run)}
    run(trunk_of(short, max(both)), trunk_folder, Lineage(forks=both))
    steps = [row["step"] for row in read_run(trunk_folder).metrics]
    assert steps == list(range(1, max(both) + 1))
    assert read_run(trunk_folder).provenance["starts"][-1]["incarnation"] == 2


def test_a_stopped_run_goes_on_bit_identically(root: Path, tmp_path: Path, arm: dict) -> None:
    run(make(root, arm), tmp_path / "whole")
    shorter = at_budget(make(root, arm), 10240)
    run(shorter, tmp_path / "half", Lineage(forks=frozenset({8})))
    run(make(root, arm), tmp_path / "half")
    whole, half = read_run(tmp_path / "whole"), read_run(tmp_path / "half")
    assert half.metrics[7]["loss_nats"] == whole.metrics[7]["loss_nats"]


def test_micro_batches_change_rounding_alone(root: Path, tmp_path: Path, arm: dict) -> None:
    run(make(root, arm), tmp_path / "whole")
    run(make(root, arm, micro_batch_sequences=2), tmp_path / "pieces")
    whole, pieces = read_run(tmp_path / "whole").metrics, read_run(tmp_path / "pieces").metrics
    assert [r["certificate"] for r in whole] == [r["certificate"] for r in pieces]
    for a, b in zip(whole, pieces, strict=True):
        assert b["loss_nats"] == pytest.approx(a["loss_nats"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_that_leaves_finite_numbers_is_a_result(
    root: Path, tmp_path: Path, stage: int
) -> None:
    wild = make(root, {"optimizer": {"learning_rate": 1e36}}, zero_stage=stage)
    outcome = run(wild, tmp_path / "wild")
    assert outcome.state == "diverged"
    stored = read_run(tmp_path / "wild")
    assert stored.summary["state"] == "diverged"
    assert stored.metrics[-1]["skipped"] is True
    assert "non-finite" in stored.summary["message"]


def test_zero_stages_agree_within_rounding(root: Path, tmp_path: Path) -> None:
    for stage in (0, 1, 2):
        run(make(root, zero_stage=stage), tmp_path / str(stage))
    losses = [[r["loss_nats"] for r in read_run(tmp_path / str(s)).metrics] for s in (0, 1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(
    root: Path, tmp_path: Path
) -> None:
    tight = make(root, {"optimizer": {"gradient_clip": 1e-3}})
    run(tight, tmp_path / "tight")
    run(make(root), tmp_path / "loose")
    first = [read_run(tmp_path / name).metrics[0]["gradient_norm"] for name in ("tight", "loose")]
    assert first[0] == first[1]
    assert first[0] > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(("subset", "blocks"), [(True, 4), (False, None)])
def test_evaluation_equals_a_float64_sum_over_targets(
    root: Path, tmp_path: Path, subset: bool, blocks: int | None
) -> None:
    from safetensors.torch import load_file

    experiment = make(root)
    run(experiment, tmp_path / "run")
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    backbone = build_backbone(experiment.run.model, 0)
    backbone.load_state_dict(load_file(last / "model.safetensors"))
    backbone.double()
    nats, targets = 0.0, 0
    for batch in evaluation_batches(
        experiment.run.corpus, root, "prose", batch_sequences=4, max_blocks=blocks
    ):
        logits = backbone.head(backbone(batch.tokens, WholeSequence(batch.documents)))
        logits = logits.detach().numpy()
        wanted = batch.targets.numpy()
        norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        for row, position in zip(*np.nonzero(wanted != IGNORED), strict=True):
            nats += norm[row, position] - logits[row, position, wanted[row, position]]
            targets += 1
    rows = read_run(tmp_path / "run").evaluations
    (row,) = [
        r for r in rows if r["evaluation_set"] == "prose" and r["decayed"] and r["subset"] is subset
    ]
    assert row["targets"] == targets
    assert row["total_nats"] == pytest.approx(nats, rel=1e-5)


def test_the_losses_of_documents_add_up_to_those_of_the_sets(root: Path, tmp_path: Path) -> None:
    run(make(root), tmp_path / "run")
    rows = [r for r in read_run(tmp_path / "run").evaluations if r["subset"] is False]
    stored = read_document_losses(tmp_path / "run", rows)
    manifest = read_manifest(root / "tiny")
    assert set(stored) == {r["evaluation_set"] for r in rows} == set(manifest.domains)
    for row in rows:
        stream = manifest.stream(str(row["evaluation_set"]), "validation")
        losses = stored[stream.domain]
        assert row["blocks"] == stream.blocks
        assert row["documents"] == len(losses.nats) <= stream.documents
        assert losses.targets.sum() == row["targets"]
        assert losses.nats.sum() == pytest.approx(row["total_nats"], rel=1e-12)
        assert losses.targets.min() > 0


def test_sets_that_no_result_is_read_from_stay_with_the_blocks_of_milestones(
    root: Path, tmp_path: Path
) -> None:
    asked = make(root)
    asked = replace(asked, evaluation=replace(asked.evaluation, final_sets=("prose",)))
    run(make(root), tmp_path / "all")
    run(asked, tmp_path / "some")
    every, some = (
        {
            (r["evaluation_set"], r["subset"]): (r["blocks"], r["total_nats"])
            for r in read_run(tmp_path / name).evaluations
            if r["decayed"]
        }
        for name in ("all", "some")
    )
    for (name, subset), measured in some.items():
        assert measured == every[name, subset or name != "prose"]
    assert set(some) == set(every)


def test_an_unknown_final_set_is_refused(root: Path, tmp_path: Path) -> None:
    asked = make(root)
    asked = replace(asked, evaluation=replace(asked.evaluation, final_sets=("prosa",)))
    with pytest.raises(ValueError, match=r"final_sets has 'prosa'.*did you mean 'prose'"):
        run(asked, tmp_path / "run")


def test_final_sets_change_the_id_of_evaluations_only_where_they_are_given() -> None:
    plain = EvaluationConfig()
    # As in records from before there was this key.
    assert evaluation_id(plain) == "4d3c5a144c49"
    assert evaluation_id(plain) != evaluation_id(replace(plain, final_sets=("prose",)))


def test_what_was_read_of_each_domain_is_recorded(root: Path, tmp_path: Path) -> None:
    run(make(root), tmp_path / "run")
    read = read_run(tmp_path / "run").summary["read_blocks"]
    blocks = {domain: counts["blocks"] for domain, counts in read.items()}
    assert sum(blocks.values()) == 10240 // 128
    assert blocks["python"] / sum(blocks.values()) == pytest.approx(0.7, abs=0.1)
    assert all(counts["most_repeats"] >= 1 for counts in read.values())


def test_rows_are_copied_to_an_offline_tracker_and_change_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run(make(root), tmp_path / "off")
    run(make(root, tracker="wandb"), tmp_path / "wandb")
    assert read_exact(tmp_path / "off") == read_exact(tmp_path / "wandb")
    assert list((tmp_path / "wandb").glob("wandb/offline-run-*"))


def test_chunked_losses_equal_whole_ones(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    backbone = build_backbone(make(root).run.model, 3)
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    hidden = backbone(tokens, WholeSequence(torch.zeros(2, 64, dtype=torch.int32)))
    whole = total_nats(backbone, hidden, tokens)
    monkeypatch.setattr("trainer.objective.CHUNK_LOGITS", 257 * 7)
    chunked = total_nats(backbone, hidden, tokens)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_cpu_step_of_mamba_calls_no_reference(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(kernels.scans.selective_scan, "selective_scan_reference", refuse)
    monkeypatch.setattr("kernels.convolution.causal_conv.causal_conv_reference", refuse)
    assert run(make(root, MAMBA), tmp_path / "run").state == "done"


def test_a_resumption_under_another_layout_is_refused(root: Path, tmp_path: Path) -> None:
    run(make(root), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"layout .*zero_stage.* go back to that"):
        run(make(root, zero_stage=1), tmp_path / "run")
