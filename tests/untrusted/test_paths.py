"""Every place where a name becomes a path, with hostile names: refused, and nothing written."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from analysis.tables.capsule import INDEX, unpack
from analysis.tables.sweep_folder import load as load_table
from data_pipelines.config import DataConfig, DatasetConfig, SourceConfig, TokenizerConfig
from data_pipelines.durable import write_durably
from data_pipelines.evaluation_sets import evaluation_sets
from data_pipelines.manifest import MANIFEST, Manifest, Shard, Stream, read_manifest, root_hash
from data_pipelines.packing import Scatter, _flush
from data_pipelines.shards import open_dataset
from launch.data import build_data, verify_data
from launch.job import TrainJob, Unit
from launch.sweep import main as sweep_main
from launch.train import main as train_main
from sweeps.grammar import read_sweep_file
from tests.trainer.conftest import PLAIN
from tests.written_paths import unproven
from trainer.manifest import manifest_text
from trainer.manifest import read_manifest as read_checkpoint
from trainer.record import RunRecord
from untrusted.paths import PathError, inside, refuse_links
from untrusted.yaml_text import dump_yaml

HOSTILE = (
    "../elsewhere", "../../elsewhere", "a/../../elsewhere", "..", ".", "", "/tmp/elsewhere", "a/b",
    "./a", "a\x00b", ".hidden", "-rf", "~root", "a\nb", " a", "a b", "x" * 300, "\u202ea", "$HOME",
    "con:1", "a\\b", "*",
)  # fmt: skip
SMOKE = "sweeps/smoke.yaml"
SHARD = Shard("alpha/train/s.mds", 1, 1, "0" * 64, "alpha/train/s.mds.zstd", 1, "0" * 64)
STREAM = Stream("alpha", "train", 1, 1, 1, 1, 1, 0, (SHARD,))
TOKENIZER = TokenizerConfig()


def run_sweep(name: str, at: Path) -> None:
    raise_of(sweep_main([SMOKE, f"name={json.dumps(name)}", "--plan", "--runs", str(at / "runs")]))


def run_ladder(name: str, at: Path) -> None:
    ladder = f"ladders={json.dumps({name: {}})}"
    raise_of(sweep_main([SMOKE, f"ladder={json.dumps(name)}", ladder, "--runs", str(at / "runs")]))


def run_dataset(name: str, at: Path) -> None:
    words = [f"corpora.embedded.dataset.name={json.dumps(name)}", f"execution.data_root={at}"]
    raise_of(sweep_main([SMOKE, *words, "--data", "--runs", str(at / "runs")]))


def run_train(name: str, at: Path) -> None:
    file = at / "run.yaml"
    file.write_text(dump_yaml({**PLAIN, "corpus": {**PLAIN["corpus"], "dataset": name}}))
    raise_of(train_main([str(file), "--runs", str(at / "runs")]))


def raise_of(code: int) -> None:
    if code == 64:
        raise ValueError("refused")


def label(name: str, at: Path) -> None:
    entry = {"rung": "10k", "label": name or "..", "execution": {"threads": 1}}
    read_sweep_file(Path(SMOKE), [f"also={json.dumps([entry])}"])


def dataset_config(name: str, at: Path) -> DatasetConfig:
    made = DatasetConfig(name="fine", source=SourceConfig("installed"))
    object.__setattr__(made, "name", name)
    return made


def data_config(name: str) -> DataConfig:
    made = DataConfig("c", "fine", TOKENIZER, {"alpha": 1.0}, 8, 8, 8)
    object.__setattr__(made, "dataset", name)
    return made


def dataset_manifest(at: Path, stream: Stream) -> None:
    made = Manifest({}, 257, "", 8, {}, (stream,), "")
    write_durably(
        at / MANIFEST, json.dumps(asdict(replace(made, root_hash=root_hash(made)))) + "\n"
    )
    read_manifest(at)


def capsule(at: Path, *names: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
    with tarfile.open(at / "capsule.tar.gz", "w:gz") as archive:
        for name in ("fine.txt", *names):
            entry = tarfile.TarInfo(name)
            entry.size = 1 if name == "fine.txt" or kind == tarfile.REGTYPE else 0
            entry.type = tarfile.REGTYPE if name == "fine.txt" else kind
            entry.linkname = to
            archive.addfile(entry, io.BytesIO(b"x"))
    unpack(at / "capsule.tar.gz", at / "opened")


def capsule_index(name: str, at: Path) -> None:
    text = json.dumps({"format": 1, "files": {name: "0" * 64}}).encode()
    with tarfile.open(at / "capsule.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo(INDEX)
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    unpack(at / "capsule.tar.gz", at / "opened")


def checkpoint(name: str, at: Path) -> None:
    folder = at / "step-00000001"
    folder.mkdir()
    files = {f"state/{name}": {"bytes": 1, "sha256": "0" * 64}}
    body = {"format": 1, "step": 1, "files": files, "trunk_id": "t", "incarnation": 1, "layout": {}}
    (folder / MANIFEST).write_text(manifest_text(body))
    read_checkpoint(folder)


def claim(name: str, at: Path) -> None:
    with TrainJob(at, (), None)._claim(Unit(name, ()), wait=False):
        pass


def table(name: str, at: Path) -> None:
    (at / "sweep.yaml").write_text(dump_yaml({"runs": [name], "config": {}}))
    load_table(at)


def scattered(name: str, at: Path) -> None:
    task = object.__new__(Scatter)
    object.__setattr__(task, "folder", str(at / "scattered"))
    object.__setattr__(task, "index", 0)
    _flush(task, name, 0, bytearray(b"x"))


PLACES: dict[str, Callable[[str, Path], object]] = {
    "the name of a sweep": run_sweep,
    "the name of a ladder": run_ladder,
    "the name of a data set in a sweep": run_dataset,
    "the name of a data set in a run": run_train,
    "the label of a run": label,
    "a data set to build": lambda name, at: build_data(dataset_config(name, at), at, Console()),
    "a data set to verify": lambda name, at: verify_data(dataset_config(name, at), at),
    "a data set to open": lambda name, at: open_dataset(data_config(name), at, None),
    "the evaluation sets of a data set": lambda name, at: evaluation_sets(at, name),
    "a domain of a manifest": lambda n, at: dataset_manifest(at, replace(STREAM, domain=n)),
    "a split of a manifest": lambda n, at: dataset_manifest(at, replace(STREAM, split=n)),
    "a shard of a manifest": lambda n, at: dataset_manifest(
        at, replace(STREAM, shards=(replace(SHARD, name=f"alpha/train/{n}"),))
    ),
    "a whole shard name of a manifest": lambda n, at: dataset_manifest(
        at, replace(STREAM, shards=(replace(SHARD, zip_name=n),))
    ),
    "a compressed shard of a manifest": lambda n, at: dataset_manifest(
        at, replace(STREAM, shards=(replace(SHARD, zip_name=f"alpha/train/{n}"),))
    ),
    "a domain of a document": scattered,
    "the last part of a capsule's member": lambda name, at: capsule(at, f"report/{name}"),
    "a capsule's index": capsule_index,
    "a file of a checkpoint": checkpoint,
    "a unit of a job": claim,
    "a run that a table lists": table,
}
"""Every place where a name that a stranger may have written becomes a path."""


BENIGN = {
    ("the last part of a capsule's member", "a/b"),
    ("the last part of a capsule's member", "a\x00b"),  # a tar ends names there
    ("a file of a checkpoint", "a/b"),
}
"""Where a path of several plain names is what is asked for."""
CASES = [(place, name) for place in PLACES for name in HOSTILE if (place, name) not in BENIGN]


@pytest.mark.parametrize(("place", "name"), CASES, ids=ascii)
def test_a_name_cannot_lead_out_of_its_folder(place: str, name: str, tmp_path: Path) -> None:
    at = tmp_path / "a" / "b"
    at.mkdir(parents=True)
    with pytest.raises((ValueError, RuntimeError)):
        PLACES[place](name, at)
    assert {each for each in tmp_path.rglob("*") if not each.is_relative_to(at)} == {at.parent}
    assert not Path("/tmp/elsewhere").exists()
    assert not (at / "opened" / "fine.txt").exists()
    assert not (at / "runs").exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "device", "fifo"])
def test_a_capsule_of_anything_but_regular_files_is_refused(kind: str, tmp_path: Path) -> None:
    types = {
        "link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "folder": tarfile.DIRTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    with pytest.raises(ValueError, match="no regular file"):
        capsule(tmp_path, "report", kind=types[kind], to="/etc")
    assert not (tmp_path / "opened" / "fine.txt").exists()


def test_a_capsule_that_holds_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice"):
        capsule(tmp_path, "fine.txt")


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs").mkdir()
    for name, target in (("smoke", "../outside"), ("dangling", "nowhere")):
        (tmp_path / "runs" / name).symlink_to(target)
        with pytest.raises(PathError, match="is a link"):
            inside(tmp_path / "runs", name)
        with pytest.raises(PathError, match="is a link"):
            inside(tmp_path / "runs", name, "below")
    assert sweep_main([SMOKE, "--plan", "--runs", str(tmp_path / "runs")]) == 64


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "run.lock", "config.yaml"])
def test_a_run_folder_with_a_link_is_not_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("../victim")
    with pytest.raises(PathError, match="is a link"):
        RunRecord(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "kept\n"
    with pytest.raises(PathError, match="is a link"):
        refuse_links(tmp_path / "run")


@pytest.mark.parametrize("name", ["a", "10k", "trunk-0a1b", "a.b_c-d", "\u4e2d\u6587", "a%20b"])
def test_a_plain_name_is_kept(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "x.json") == tmp_path / name / "x.json"


@pytest.mark.parametrize(
    "write",
    [
        "(folder / row['name']).open('w')",
        "(folder / name / 'x.json').write_text('')",
        "(self._folder / f'{name}.json').mkdir()",
        "path.with_name(name).write_bytes(b'')",
        "path.with_name(path.name + name).touch()",
        "Path(root, name).mkdir()",
        "root.joinpath(*names).mkdir()",
        "Path(row['path']).unlink()",
        "open(name, 'w')",
    ],
)
def test_the_linter_finds_a_write_to_an_unproven_path(write: str, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    file = tmp_path / "launch" / "new.py"
    file.write_text(f"def save(folder, path, name):\n    {write}\n")
    (line,) = unproven(tmp_path, {})
    assert line.startswith("launch/new.py:save: ")
    file.write_text("def save(folder, name):\n    inside(folder, name).write_text('')\n")
    assert unproven(tmp_path, {}) == []


def test_every_path_of_the_product_is_proven() -> None:
    assert unproven() == []


def test_a_reason_for_a_path_that_is_gone_is_found(tmp_path: Path) -> None:
    assert unproven(tmp_path, {"launch/gone.py:f: name": "x"}) == [
        "launch/gone.py:f: name of TRUSTED is not there; remove it"
    ]
