"""A study in one file: the same bytes again, opened without trust, complete but for weights."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.report.write import redraw
from analysis.tables.capsule import pack, unpack
from analysis.tables.sweep_folder import load
from tests.analysis.synthetic_study import Study, write

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    study = Study(sizes={"r9k": 9e3, "r30k": 3e4}, seeds={}, horizons=(4.5e5,))
    folder = write(study, tmp_path_factory.mktemp("runs") / "tiny", np.random.default_rng(0))
    redraw(folder)
    return folder


@pytest.fixture(scope="module")
def capsule(root):
    return pack(root, ROOT, root.parent / "tiny.tar.gz")


def rewritten(capsule, target, change):
    """The capsule with its entries passed through `change`, a function of name and bytes."""
    with tarfile.open(capsule) as old, tarfile.open(target, "w:gz") as new:
        for entry in old.getmembers():
            data = change(entry.name, old.extractfile(entry).read())
            if data is not None:
                entry.size = len(data)
                new.addfile(entry, io.BytesIO(data))
    return target


def test_the_same_study_gives_the_same_bytes(root, capsule, tmp_path):
    assert pack(root, ROOT, tmp_path / "again.tar.gz").read_bytes() == capsule.read_bytes()


def test_the_table_comes_back_as_it_was_in_both_forms(root, capsule, tmp_path):
    opened = unpack(capsule, tmp_path / "opened")
    rows = load(root).rows
    pd.testing.assert_frame_equal(opened.rows, rows, check_dtype=False)
    losses = pd.read_csv(opened.folder / "table.csv")["loss_nats"]
    np.testing.assert_array_equal(losses, rows["loss_nats"])


def test_it_holds_configs_lock_figures_and_no_weights(capsule, tmp_path):
    names = set(unpack(capsule, tmp_path / "opened").index["files"])
    assert {"sweep.yaml", "requirements.lock", "table.parquet", "report/index.html"} <= names
    assert any(name.startswith("report/figures/") for name in names)
    assert sum(name.endswith("config.yaml") for name in names) == 16
    assert not any("safetensors" in name for name in names)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda name, data: data + b" " if name == "table.csv" else data, "not what was packed"),
        (lambda name, data: None if name == "runs.csv" else data, "differ in runs.csv"),
        (lambda name, data: b"{}" if name == "CAPSULE.json" else data, "not a capsule of format"),
    ],
)
def test_a_changed_capsule_is_an_error(capsule, tmp_path, change, needle):
    bad = rewritten(capsule, tmp_path / "bad.tar.gz", change)
    with pytest.raises(ValueError, match=needle):
        unpack(bad, tmp_path / "opened")


def test_a_capsule_cannot_write_outside_its_folder(tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../escaped")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="is not a capsule"):
        unpack(tmp_path / "evil.tar.gz", tmp_path / "opened")
    assert not (tmp_path / "escaped").exists()


def test_what_cannot_be_packed_or_opened_says_what_to_do(root, tmp_path):
    with pytest.raises(ValueError, match="give it that suffix"):
        pack(root, ROOT, tmp_path / "x.zip")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no report"):
        pack(tmp_path / "bare", ROOT, tmp_path / "x.tar.gz")
    (tmp_path / "text.tar.gz").write_text("no")
    with pytest.raises(ValueError, match="is not a capsule"):
        unpack(tmp_path / "text.tar.gz", tmp_path / "opened")
