"""The smoke sweep as a user runs it: whole, again, killed, on two processes, and on bad input."""

import json
import math
import os
import re
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.launch.command import ROOT, command, forked, start
from tests.trainer.study import read_exact
from trainer.record import RunRecord, read_json, read_rows, read_run

pytestmark = pytest.mark.slow
SMOKE = ("launch/sweep.py", "sweeps/smoke.yaml")
SMALLER = "ladders.default.rungs=[10k]"
"""Half of its runs, by the same ids: both architectures and corpora, trunks, branches, repeats."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke sweep that ran undisturbed, data building included."""
    runs = tmp_path_factory.mktemp("swept")
    ended = command(*SMOKE, "--runs", str(runs), f"execution.data_root={data}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Report:" in ended.stdout
    return runs / "smoke"


def stored_sweep(folder: Path) -> dict:
    return yaml.safe_load((folder / "sweep.yaml").read_text())


def test_every_run_is_complete_and_in_the_report(swept: Path) -> None:
    listed = stored_sweep(swept)
    assert len(listed["runs"]) == 24
    for name in [*listed["runs"], *listed["repeats"]]:
        assert read_json(swept / name / "summary.json")["state"] == "done"
    page = (swept / "report" / "index.html").read_text()
    assert "24 of 24" in page
    assert (swept / "ladder.parquet").exists()


def test_the_same_command_again_trains_nothing(swept: Path, data: Path) -> None:
    before = len(read_rows(swept / "journal.jsonl"))
    ended = forked(*SMOKE, "--runs", str(swept.parent), f"execution.data_root={data}")
    assert ended.returncode == 0, ended.stdout
    assert "26 complete" in ended.stdout
    assert len(read_rows(swept / "journal.jsonl")) == before


def test_two_processes_equal_one(swept: Path) -> None:
    one, two = (read_run(swept / name) for name in sorted(stored_sweep(swept)["repeats"]))
    assert one.provenance["execution"]["ranks"] == 1
    assert two.provenance["execution"]["ranks"] == 2
    assert two.provenance["execution"]["zero_stage"] == 2
    assert [r["certificate"] for r in one.metrics] == [r["certificate"] for r in two.metrics]
    for a, b in zip(one.metrics[:20], two.metrics[:20], strict=True):
        assert math.isclose(a["loss_nats"], b["loss_nats"], rel_tol=2e-5)  # type: ignore[arg-type]


def test_a_cell_of_its_capsule_trains_again_to_the_same_losses(swept: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "smoke.tar.gz")
    packed = forked("launch/capsule.py", "pack", str(swept), file)
    assert packed.returncode == 0, packed.stdout
    again = command("launch/capsule.py", "retrain", file)
    assert again.returncode == 0, again.stdout + again.stderr
    drifts = re.findall(r"drift ([+-][\d.]+) %", again.stdout)
    assert len(drifts) == 3
    assert all(float(drift) == 0.0 for drift in drifts)


def seal_again(run: Path) -> None:
    """State in a run's summary the rows that it has now, as if it had written them."""
    summary = read_json(run / "summary.json")
    if summary:
        with closing(RunRecord(run)) as record:
            record.write_summary({**summary, "rows": record.seals})


def test_a_drift_is_told_and_ends_with_1(swept: Path, tmp_path: Path) -> None:
    study = shutil.copytree(swept, tmp_path / "smoke")
    for rows in study.glob("*/evaluations.jsonl"):
        stored = [json.loads(line) for line in rows.read_text().splitlines()]
        scaled = ("total_nats", "bits_per_byte")
        changed = [{**row, **{key: 1.01 * float(row[key]) for key in scaled}} for row in stored]
        rows.write_text("".join(json.dumps(row) + "\n" for row in changed))
        seal_again(rows.parent)
    file = str(tmp_path / "smoke.tar.gz")
    assert forked("launch/capsule.py", "pack", str(study), file).returncode == 0
    again = forked("launch/capsule.py", "retrain", file)
    assert again.returncode == 1, again.stdout
    assert "drift -0.99" in again.stdout
    assert "beyond 0.001" in again.stdout


def test_kill_of_everything_then_the_same_command_ends_bit_identically(
    swept: Path, data: Path, tmp_path: Path
) -> None:
    words = (*SMOKE, SMALLER, "--runs", str(tmp_path), f"execution.data_root={data}")
    running = start(*words)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("smoke/*/summary.json"))) < 4 and time.monotonic() < deadline:
        assert running.poll() is None, "the sweep ended by itself"
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    ended = forked(*words)
    assert ended.returncode == 0, ended.stdout
    listed = stored_sweep(tmp_path / "smoke")
    assert len(listed["runs"]) == 12
    for name in [*listed["runs"], *listed["trunks"], *listed["repeats"]]:
        assert read_exact(tmp_path / "smoke" / name) == read_exact(swept / name), name


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_shard_stops_every_run_with_one_message(
    swept: Path, data: Path, tmp_path: Path, damage: str
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    shard = next((root / "smoke" / "python" / "train").glob("*.zstd"))
    for raw in shard.parent.glob("*.mds"):
        raw.unlink()
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    few = (SMALLER, "architectures=[transformer]")
    words = (*SMOKE, *few, "--runs", str(tmp_path / "runs"), f"execution.data_root={root}")
    ended = forked(*words)
    assert ended.returncode != 0
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("failed:")]
    assert shard.name in line
    assert not list((tmp_path / "runs").glob("smoke/*/summary.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sweeps/scaling.yaml", "laddder=nano"), "did you mean 'ladder'"),
        (("sweeps/scaling.yaml", "ladders.default.rungs=[11k]"), "unknown rung '11k'"),
        (("sweeps/none.yaml",), "sweeps/none.yaml does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    ended = forked("launch/sweep.py", *words, "--runs", str(tmp_path / "runs"))
    assert ended.returncode == 64
    assert message in " ".join(ended.stdout.split())
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="session")
def killed_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a build of the data was killed between two stages."""
    root = tmp_path_factory.mktemp("killed")
    words = (*SMOKE, "--runs", str(root / "runs"), f"execution.data_root={root / 'data'}")
    killed = command(*words, "architectures=[transformer]", fault="build.after_pack:1")
    assert killed.returncode == 65
    assert "killed by SIGKILL" in " ".join(killed.stdout.split())
    return root


@pytest.fixture
def half_built(killed_build: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A copy of those data, and the words of the command that goes on with them."""
    data = shutil.copytree(killed_build / "data", tmp_path / "data")
    return data, (*SMOKE, "--runs", str(tmp_path / "runs"), f"execution.data_root={data}")


def test_a_full_disk_while_building_data_is_one_clear_message(
    half_built: tuple[Path, tuple[str, ...]],
) -> None:
    data, words = half_built
    ended = command(*words, fault="build.stream_written:1:enospc")
    assert ended.returncode == 65
    assert "free" in ended.stdout
    assert not (data / "smoke").exists()
    assert ended.stdout.count("error:") == 1


def test_a_killed_build_of_the_data_is_resumed(
    swept: Path, half_built: tuple[Path, tuple[str, ...]]
) -> None:
    data, words = half_built
    built = forked(*words, "--data")
    assert built.returncode == 0, built.stdout
    roots = {
        read_json(ROOT / folder / "smoke" / "MANIFEST.json")["root_hash"]
        for folder in (data, data_root_of(swept))
    }
    assert len(roots) == 1


def data_root_of(swept: Path) -> Path:
    """The data that a sweep was made from."""
    name = stored_sweep(swept)["runs"][0]
    return Path(read_run(swept / name).provenance["execution"]["data_root"])


def test_a_trained_run_continues_a_prompt(swept: Path, data: Path) -> None:
    run = swept / stored_sweep(swept)["runs"][0]
    words = ("launch/generate.py", str(run), "def ", "--data", str(data), "--tokens", "12")
    first, second = (forked(*words, "--temperature", "0") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert len(first.stdout.encode()) == len("def ") + 12 + 1
    assert first.stdout == second.stdout
    assert "decode" in first.stderr


def test_a_folder_without_a_run_cannot_generate(tmp_path: Path) -> None:
    ended = forked("launch/generate.py", str(tmp_path), "x")
    assert ended.returncode == 64
    assert "config.yaml does not exist" in ended.stderr
