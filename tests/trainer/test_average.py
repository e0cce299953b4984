"""Averages of weights: the mean that they should be, and everything that reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.evaluation_sets import evaluation_batches
from launch.trained_run import load_run
from models.backbone import build_backbone
from models.sequences.whole import WholeSequence
from sweeps.checks import check_run
from tests.trainer.study import at_budget, build_tiny, make, read_exact, run, trunk_of
from trainer.average import WeightAverage
from trainer.config import ExecutionConfig
from trainer.objective import total_nats
from trainer.record import read_run
from trainer.schedule import decay_begins
from trainer.schema import ConfigError
from trainer.session import Lineage

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DECAY = 0.8
AVERAGED = {"optimizer": {"ema_decay": DECAY}}
ALL = {"save_every_tokens": 512, "keep_checkpoints": 99}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(make(root, **ALL), folder)
    return folder


@pytest.fixture(scope="module")
def averaged(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    run(make(root, AVERAGED, **ALL), folder)
    return folder


def weights_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_stored_model_is_the_weighted_mean_over_the_steps(
    plain: Path, averaged: Path, steps: int
) -> None:
    counts = DECAY ** np.arange(steps - 1, -1, -1.0)
    trained = [weights_at(plain, step) for step in range(1, steps + 1)]
    for name, found in weights_at(averaged, steps).items():
        each = np.stack([weights[name].double().numpy() for weights in trained])
        wanted = np.tensordot(counts / counts.sum(), each, axes=1)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-7, err_msg=name)


def test_an_average_changes_nothing_of_the_training(plain: Path, averaged: Path) -> None:
    assert read_exact(averaged)[0] == read_exact(plain)[0]


def test_evaluations_are_of_the_stored_average_and_say_so(root: Path, averaged: Path) -> None:
    experiment = make(root, AVERAGED)
    rows = read_run(averaged).evaluations
    assert all(row["averaged"] for row in rows)
    for step, subset in ((10, True), (20, False)):
        backbone = build_backbone(experiment.run.model, 0)
        backbone.load_state_dict(weights_at(averaged, step))
        blocks = 4 if subset else None
        batches = evaluation_batches(
            experiment.run.corpus, root, "prose", batch_sequences=4, max_blocks=blocks
        )
        with torch.no_grad():
            nats = sum(
                float(
                    total_nats(backbone, backbone(b.tokens, WholeSequence(b.documents)), b.targets)
                )
                for b in batches
            )
        (row,) = [
            r for r in rows
            if (r["step"], r["evaluation_set"], r["subset"]) == (step, "prose", subset)
        ]  # fmt: skip
        assert row["total_nats"] == pytest.approx(nats, rel=1e-5)


def test_evaluations_of_plain_weights_say_nothing_of_averages(plain: Path) -> None:
    assert not any("averaged" in row for row in read_run(plain).evaluations)


def test_what_is_generated_is_of_the_average(averaged: Path) -> None:
    loaded = load_run(averaged)
    assert loaded.weights.keys() == weights_at(averaged, 20).keys()
    assert all(torch.equal(w, loaded.weights[n]) for n, w in weights_at(averaged, 20).items())


def test_a_branch_goes_on_with_the_average_of_its_trunk(
    root: Path, tmp_path: Path, averaged: Path
) -> None:
    alone = make(root, AVERAGED)
    longer = at_budget(alone, 20480)
    forks = frozenset({decay_begins(alone.run), decay_begins(longer.run)})
    run(trunk_of(longer, max(forks)), tmp_path / "trunk", Lineage(forks=forks))
    run(alone, tmp_path / "branch", Lineage(trunk=tmp_path / "trunk"))
    branch, whole = read_run(tmp_path / "branch"), read_run(averaged)
    assert branch.summary["parameters_sha256"] == whole.summary["parameters_sha256"]
    assert branch.evaluations[-1]["total_nats"] == whole.evaluations[-1]["total_nats"]


@pytest.mark.parametrize("stage", [1, 2])
def test_averages_are_the_same_under_zero(
    root: Path, tmp_path: Path, averaged: Path, stage: int
) -> None:
    run(make(root, AVERAGED, zero_stage=stage, **ALL), tmp_path / "run")
    for step in (1, 20):
        wanted = weights_at(averaged, step)
        for name, found in weights_at(tmp_path / "run", step).items():
            np.testing.assert_allclose(found, wanted[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_trained_weights_are_back_after_an_error() -> None:
    module = torch.nn.Linear(3, 2)
    average = WeightAverage(module, DECAY)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    seen = []

    def fail() -> None:
        with average.in_place():
            seen.append(module.weight.detach().clone())
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert torch.equal(seen[0], first)
    assert torch.equal(module.weight, first + 1.0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_gives_no_average_is_refused(root: Path, decay: float) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.ema_decay {decay} is not between 0 and 1"):
        make(root, {"optimizer": {"ema_decay": decay}})


def test_an_average_of_sharded_weights_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"ema_decay is 0\.8, but execution\.zero_stage 3 shards"):
        check_run(make(root, AVERAGED).run, ExecutionConfig(zero_stage=3))
