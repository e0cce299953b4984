"""The command that swaps HiP into a trained run, on a tiny one."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from launch.swap import main
from launch.trained_run import only_run
from tests.launch.command import command
from tests.trainer.study import build_tiny, make, run
from trainer.schema import ConfigError

SEQ_LEN = 64
FIELDS = ("--sequences", "3", "--n-sink", "1", "--window", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sweep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    run(make(data), folder / "one")
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"runs": ["one"]}))
    return folder


@pytest.fixture(scope="module")
def swaps(sweep: Path, data: Path) -> Path:
    ended = evaluated(sweep, data, "--k", "4", "16", "64")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "minus dense" in ended.stdout
    return sweep / "one" / "swaps"


def evaluated(folder: Path, data: Path, *words: str):
    return command("launch/swap.py", str(folder), "--data", str(data), *FIELDS, *words)


def report(swaps: Path) -> dict:
    return json.loads((swaps / "hip.json").read_text())


def chance(k: int) -> float:
    """Share of a query's best k keys that k keys drawn at random hit, over queries with more."""
    return sum(k / keys for keys in range(k + 1, SEQ_LEN + 1)) / (SEQ_LEN - k)


def test_every_selection_and_k_is_a_row_beside_a_figure(swaps: Path) -> None:
    rows = report(swaps)["rows"]
    points = {(row["selection"], row["k"]) for row in rows}
    assert points == {(s, k) for s in ("row", "block", "recent") for k in (4, 16, 64)}
    with (swaps / "hip.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (swaps / "hip.png").stat().st_size > 10_000


def test_keeping_every_key_is_dense_and_keeping_few_is_not(swaps: Path) -> None:
    whole = report(swaps)
    for row in whole["rows"]:
        mean = math.fsum(row["differences_nats"]) / whole["sequences"]
        assert math.isclose(row["loss_nats"] - whole["dense_loss_nats"], mean, abs_tol=1e-9)
        if row["k"] >= SEQ_LEN:
            assert row["largest_token_difference_nats"] < 1e-5
            assert row["recall"] is None
        elif row["selection"] != "recent":
            assert row["largest_token_difference_nats"] > 1e-5
            assert 0 < row["recall"] < 1
            assert math.isclose(row["chance_recall"], chance(row["k"]))


def test_keys_read_are_counted_of_the_keys_there_are(swaps: Path) -> None:
    for row in report(swaps)["rows"]:
        most = row["k"] + 1 + 4
        expected = sum(min(place + 1, most) for place in range(SEQ_LEN)) / SEQ_LEN
        assert math.isclose(row["most_keys_read"], expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--swap", "attention"), "--swap attention is not a swap"),
        (("--swap", "attention=hipp"), "did you mean 'hip'"),
        (("--swap", "mamba=hip"), "the model's mixers are attention"),
        (("--swap", "attention=window"), "unknown key model.blocks.a.mixer.selection"),
        (("--set", "verse"), "unknown evaluation set 'verse'; known: prose, python"),
        (("--sequences", "100000"), "ask for at most that many"),
        (("--k", "7"), "k 7 is not a multiple of key_block"),
    ],
)
def test_bad_input_is_one_clear_message(
    sweep: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "out"
    code = main([str(sweep), "--data", str(data), *FIELDS, "--out", str(out), *words])
    assert code == 64
    assert message in " ".join(capsys.readouterr().out.split())
    assert not out.exists()


def test_a_sweep_of_several_runs_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": ["a", "b"]}))
    with pytest.raises(ConfigError, match="a sweep of 2 runs"):
        only_run(tmp_path)
