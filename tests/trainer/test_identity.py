"""A run, its checkpoints, its data and its record are of one run, or they are refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_pipelines.config import TokenizerConfig
from launch.run_status import status_of
from launch.swap import main as swap
from launch.trained_run import load_run
from tests.trainer.conftest import PLAIN
from tests.trainer.study import at_budget, build_tiny, make, read_exact, run
from trainer.identity import IdentityError
from trainer.record import read_json, read_run
from trainer.session import Lineage

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(make(root), folder).state == "done"
    return folder


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "own")


@pytest.fixture(scope="module")
def other_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the same name whose text differs."""
    return build_tiny(tmp_path_factory.mktemp("other"), seed=6)


BPE = {
    "model": {**PLAIN["model"], "vocab_size": 300},
    "corpus": {"tokenizer": {"kind": "bpe", "vocab_size": 300}},
}
OTHERS = {
    "seed": {"seed": 18},
    "rate": {"optimizer": {"learning_rate": 0.02}},
    "corpus": {"corpus": {"domains": {"python": 0.3, "prose": 0.7}}},
    "warm-up": {"schedule": {"warmup_tokens": 1024}},
    "decay": {"schedule": {"decay_fraction": 0.5}},
    "final rate": {"schedule": {"final_share": 0.5}},
    "longer": {"budget": {"tokens": 20480}},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=list(OTHERS))
def test_a_checkpoint_of_another_run_is_not_resumed(
    root: Path, tmp_path: Path, finished: Path, changes: dict
) -> None:
    asked = make(root, changes)
    folder = tmp_path / asked.folder_name
    shutil.copytree(finished / "checkpoints", folder / "checkpoints")
    with pytest.raises(IdentityError, match=r"step-00000020 has the (trunk|run) id .*move"):
        run(asked, folder)
    assert not (folder / "summary.json").exists()
    assert not (folder / "provenance.json").exists()


def test_a_checkpoint_of_another_dataset_is_not_resumed(
    other_root: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(IdentityError, match="step-00000020 has the dataset root hash"):
        run(make(other_root), tmp_path / "run")


def test_a_branch_refuses_the_trunk_of_another_run(root: Path, tmp_path: Path) -> None:
    run(at_budget(make(root, {"seed": 18}), 20480), tmp_path / "trunk", Lineage(frozenset({15})))
    with pytest.raises(IdentityError, match="has the trunk id"):
        run(make(root), tmp_path / "branch", Lineage(trunk=tmp_path / "trunk"))


def test_weights_of_a_shorter_horizon_are_no_fork_of_a_longer_one(
    root: Path, tmp_path: Path, finished: Path
) -> None:
    longer = at_budget(make(root), 40960)
    with pytest.raises(IdentityError, match="has the run id"):
        run(longer, tmp_path / "longer", Lineage(trunk=finished))


EDITS = {
    "rope_theta": ("model", "blocks", "a", "mixer", "rope_theta"),
    "norm_eps": ("model", "norm_eps"),
    "seed": ("seed",),
    "budget": ("budget", "tokens"),
    "learning rate": ("optimizer", "learning_rate"),
    "weight decay": ("optimizer", "weight_decay"),
}


def _edit(folder: Path, path: tuple[str, ...], value: object) -> None:
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    assert path[-1] in inner
    inner[path[-1]] = value
    file.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("path", EDITS.values(), ids=list(EDITS))
def test_a_config_edited_after_training_opens_nothing(
    root: Path, own: Path, path: tuple[str, ...]
) -> None:
    _edit(own, path, {"seed": 18, "tokens": 20480}.get(path[-1], 0.25))
    with pytest.raises(IdentityError, match=r"config\.yaml has the config hash"):
        load_run(own)
    with pytest.raises(IdentityError, match=r"config\.yaml"):
        status_of(make(root), own)
    with pytest.raises(IdentityError, match=r"config\.yaml has the config hash"):
        run(make(root), own)


def test_a_mixer_replaced_by_one_of_the_same_weights_opens_nothing(own: Path) -> None:
    file = own / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["model"]["blocks"]["a"]["mixer"] = {"kind": "window", "n_heads": 2, "window": 8}
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(IdentityError, match=r"config\.yaml has the config hash"):
        load_run(own)


def test_weights_of_another_run_open_nothing(root: Path, own: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(make(root, {"seed": 18}), other)
    shutil.rmtree(own / "checkpoints")
    shutil.copytree(other / "checkpoints", own / "checkpoints")
    with pytest.raises(IdentityError, match="step-00000020 has the trunk id"):
        load_run(own)


def test_a_record_of_the_same_config_and_other_weights_is_refused(own: Path) -> None:
    summary = read_json(own / "summary.json")
    changed = {**summary, "parameters_sha256": "0" * 64}
    (own / "summary.json").write_text(json.dumps(changed))
    with pytest.raises(IdentityError, match="hash of the final weights"):
        load_run(own)


def test_a_replaced_tokenizer_opens_nothing(tmp_path: Path) -> None:
    data = build_tiny(tmp_path / "data", tokenizer=TokenizerConfig("bpe", vocab_size=300))
    asked, folder = make(data, BPE), tmp_path / "run"
    run(asked, folder)
    load_run(folder).tokenizer(data)
    file = data / "tiny" / "tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(content))
    with pytest.raises(IdentityError, match="tokenizer fingerprint"):
        load_run(folder).tokenizer(data)
    with pytest.raises(IdentityError, match=r"the tokenizer in .* has the tokenizer fingerprint"):
        run(asked, folder)


def test_a_replaced_dataset_is_not_evaluated(
    own: Path, other_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(own), "--data", str(other_root), "--sequences", "3", "--k", "8"]
    assert swap(words) != 0
    assert "dataset root hash" in " ".join(capsys.readouterr().out.split())


def test_a_run_and_its_horizons_open_as_before(root: Path, finished: Path, tmp_path: Path) -> None:
    again = shutil.copytree(finished, tmp_path / "again")
    assert load_run(again).step == 20
    assert run(make(root), again).state == "done"
    assert read_exact(again) == read_exact(finished)
    assert len(read_run(again).provenance["starts"]) == 2
