"""Twenty steps of each training recipe: resumed bit for bit, and on two ranks the run of one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import PLAIN
from tests.trainer.sequence_parallel import LOSS_BOUND, NORM_BOUND, agreement, train_all
from tests.trainer.study import build_tiny, make, read_exact, run
from trainer.ids import run_id
from trainer.record import read_run
from trainer.schedule import learning_rate

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": {"kind": "muon"}},
    "lion": {"optimizer": {"kind": "lion", "learning_rate": 0.002, "beta2": 0.98}},
    "independent decay": {
        "optimizer": {"weight_decay": 0.01, "independent_weight_decay": True},
    },
    "z-loss": {"z_loss": 0.01},
    "average": {"optimizer": {"ema_decay": 0.8}},
    "muP": {"model": {**PLAIN["model"], "mup": {"base_width": 8, "base_head_dim": 4}}},
    "cosine": {"schedule": {"kind": "cosine", "decay_fraction": 0.2}},
}
EVERY = {"save_every_tokens": 8 * 512, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(make(root), folder)
    return folder


@pytest.fixture(scope="module", params=RECIPES)
def recipe(
    root: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    """A recipe's name, and its finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert run(make(root, RECIPES[request.param], **EVERY), folder).state == "done"
    return request.param, folder


def test_a_recipe_learns_and_is_another_run(
    root: Path, plain: Path, recipe: tuple[str, Path]
) -> None:
    name, folder = recipe
    stored, before = read_run(folder), read_run(plain)
    losses = [float(row["loss_nats"] or 0) for row in stored.metrics]
    assert losses[-1] < losses[0] - 0.5
    assert stored.provenance["run_id"] != before.provenance["run_id"]
    assert stored.summary["parameters_sha256"] != before.summary["parameters_sha256"]
    assert stored.summary["certificate"] == before.summary["certificate"]
    config = make(root, RECIPES[name]).run
    assert stored.provenance["run_id"] == run_id(config)
    rates = [row["learning_rate"] for row in stored.metrics]
    assert rates == [learning_rate(config, step) for step in range(config.steps)]


def test_nothing_before_the_end_counts_as_decayed(recipe: tuple[str, Path]) -> None:
    rows = read_run(recipe[1]).evaluations
    assert {(row["step"], row["decayed"]) for row in rows} == {(10, False), (20, True)}


def test_a_recipe_resumes_bit_identically(
    root: Path, tmp_path: Path, recipe: tuple[str, Path]
) -> None:
    name, folder = recipe
    again = shutil.copytree(folder, tmp_path / "run")
    (again / "summary.json").unlink()
    for step in (16, 20):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    run(make(root, RECIPES[name], **EVERY), again)
    starts = [row["incarnation"] for row in read_run(again).metrics]
    assert starts == [1] * 8 + [2] * 12
    assert read_exact(again) == read_exact(folder)


def test_the_recorded_loss_is_without_z_loss(root: Path, plain: Path, tmp_path: Path) -> None:
    run(make(root, RECIPES["z-loss"]), tmp_path / "z-loss")
    first, other = (read_run(folder).metrics[0] for folder in (plain, tmp_path / "z-loss"))
    assert other["loss_nats"] == first["loss_nats"]
    assert other["gradient_norm"] != first["gradient_norm"]


@pytest.mark.distributed
def test_two_ranks_train_a_recipe_as_one_does(root: Path, tmp_path: Path) -> None:
    names = list(RECIPES)
    for ranks in (1, 2):
        experiments = [make(root, RECIPES[name], ranks=ranks) for name in names]
        train_all(experiments, names, tmp_path / str(ranks))
    for name in names:
        found = agreement(tmp_path / "1" / name, tmp_path / "2" / name)
        assert found.same_samples, name
        assert found.loss <= LOSS_BOUND, f"{name}: {found}"
        assert found.norm <= NORM_BOUND, f"{name}: {found}"


def test_lion_is_the_same_under_zero(root: Path, tmp_path: Path) -> None:
    for stage in (0, 1, 2):
        run(make(root, RECIPES["lion"], zero_stage=stage), tmp_path / str(stage))
    losses = [[r["loss_nats"] for r in read_run(tmp_path / str(s)).metrics] for s in (0, 1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
