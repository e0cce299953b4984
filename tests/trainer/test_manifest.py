"""A committed checkpoint that was touched is refused, by file and reason, and runs no code."""

import os
import pickle
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.trainer.checkpoint_samples import (
    FILES,
    SOLO,
    flip_bit,
    reseal,
    save,
    sha256,
    tree,
    truncate,
    verify,
)
from trainer.checkpoint import newest
from trainer.manifest import (
    MANIFEST,
    CheckpointError,
    inspect,
    read_manifest,
    refuse_unsafe,
    verified_file,
)
from trainer.record import RunRecord


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


@pytest.fixture
def record(tmp_path):
    with closing(RunRecord(tmp_path / "run")) as opened:
        yield opened


@pytest.fixture
def two(record):
    """The folder of a run with checkpoints at steps 10 and 20."""
    save(record, 10, 20)
    return record.checkpoints


def empty(file):
    file.write_bytes(b"")


def replace_by_link(file):
    copy = file.rename(next(path for path in file.parents if path.name == "run") / "copy")
    file.symlink_to(copy)


DAMAGES = {
    "hash": flip_bit,
    "size": truncate,
    "size-empty": empty,
    "missing": Path.unlink,
    "link": replace_by_link,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(two, kind, name):
    DAMAGES[kind](two / "step-00000020" / name)

    found = newest(two, SOLO, None)

    assert found is not None
    assert found.manifest["step"] == 10
    (rejected,) = found.rejected
    reason = kind.partition("-")[0]
    assert rejected.reason == reason
    assert f"step-00000020/{name}" in rejected.message
    assert sorted(path.name for path in two.iterdir()) == [
        "step-00000010",
        f"step-00000020.bad-{reason}",
    ]


@pytest.mark.parametrize("position", range(0, 5000, 499))
def test_every_flipped_bit_is_found_wherever_it_is(two, position):
    file = two / "step-00000020" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: content differs"):
        verify(file.parent)


def test_every_flipped_bit_of_a_manifest_is_found(two):
    file = two / "step-00000020" / MANIFEST
    whole = file.read_bytes()
    for position in range(0, len(whole) - 1, 7):
        if whole[position : position + 1].isspace():
            continue
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
            verify(file.parent)


def test_an_extra_file_is_refused(two):
    (two / "step-00000020" / "deepspeed" / "extra.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"deepspeed/extra\.pt: not in the manifest"):
        verify(two / "step-00000020")


def test_files_swapped_between_ranks_are_refused(two):
    one, other = (two / "step-00000020" / name for name in FILES[1:])
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with pytest.raises(CheckpointError):
        verify(two / "step-00000020")


def test_a_manifest_of_another_step_is_refused(two):
    (two / "step-00000020" / MANIFEST).write_bytes((two / "step-00000010" / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError, match="belongs to step 10"):
        verify(two / "step-00000020")


def test_a_folder_renamed_to_another_step_is_refused(two):
    (two / "step-00000020").rename(two / "step-00000030")
    with pytest.raises(CheckpointError, match="belongs to step 20"):
        verify(two / "step-00000030")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"tokens": 10240', '"tokens": 10241'),
        lambda text: text.replace('"pinned": false', '"pinned": true'),
        lambda text: text.replace('"manifest_sha256"', '"other"'),
        lambda text: text[: len(text) // 2],
        lambda _text: "",
        lambda _text: "[]",
        lambda _text: "[" * 100_000,
    ],
)
def test_an_edited_manifest_is_refused(two, edit):
    file = two / "step-00000020" / MANIFEST
    edited = edit(file.read_text())
    assert edited != file.read_text()
    file.write_text(edited)
    found = newest(two, SOLO, None)
    assert found is not None
    assert [rejected.reason for rejected in found.rejected] == ["manifest"]
    assert found.manifest["step"] == 10


def test_a_missing_manifest_is_damage_and_not_absence(two):
    (two / "step-00000020" / MANIFEST).unlink()
    found = newest(two, SOLO, None)
    assert found is not None
    assert "step-00000020/MANIFEST.json: missing" in found.rejected[0].message


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "deepspeed/../../x"])
def test_a_manifest_that_lists_a_path_outside_is_refused(two, name):
    folder = two / "step-00000020"
    reseal(folder, files={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match="leaves the folder"):
        verify(folder)


@pytest.mark.parametrize(
    "changes", [{"files": []}, {"files": {"x": {}}}, {"files": {"x": 1}}, {"step": "20"}]
)
def test_a_manifest_of_another_shape_is_refused_even_with_a_fitting_hash(two, changes):
    reseal(two / "step-00000020", **changes)
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_manifest(two / "step-00000020")


def test_a_later_format_is_refused(two):
    reseal(two / "step-00000020", format=2)
    with pytest.raises(CheckpointError, match="format 2, known: 1"):
        verify(two / "step-00000020")


def test_a_folder_reached_by_a_link_is_refused(two, tmp_path):
    (two / "step-00000020").rename(tmp_path / "step-00000020")
    (two / "step-00000020").symlink_to(tmp_path / "step-00000020")
    with pytest.raises(CheckpointError, match="link"):
        verify(two / "step-00000020")


def test_one_file_can_be_read_by_itself(two):
    folder = two / "step-00000020"
    flip_bit(folder / FILES[1])
    manifest = read_manifest(folder)
    assert verified_file(folder, manifest, FILES[0]) == folder / FILES[0]
    with pytest.raises(CheckpointError, match=FILES[1]):
        verified_file(folder, manifest, FILES[1])


def test_code_in_a_file_is_refused_without_being_run(two, tmp_path):
    folder, canary = two / "step-00000020", tmp_path / "canary"
    torch.save({"module": Canary(canary)}, folder / FILES[1])
    size, digest = (folder / FILES[1]).stat().st_size, sha256(folder / FILES[1])
    files = {**read_manifest(folder)["files"], FILES[1]: {"bytes": size, "sha256": digest}}
    reseal(folder, files=files)

    found = newest(two, SOLO, None)

    assert found is not None
    assert found.manifest["step"] == 10
    assert found.rejected[0].reason == "unsafe"
    assert "posix.mkdir" in found.rejected[0].message
    assert not canary.exists()


def test_the_canary_would_sing(tmp_path):
    torch.save({"module": Canary(tmp_path / "canary")}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.anything", "x"])
def test_a_plain_pickle_is_refused_whatever_its_name(two, tmp_path, name):
    folder = two / "step-00000020"
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    reseal(folder, files={**read_manifest(folder)["files"], name: entry})
    with pytest.raises(CheckpointError, match="not a plain torch file"):
        verify(folder)
    assert not (tmp_path / "canary").exists()


def test_tensors_and_plain_values_are_not_called_unsafe(tmp_path):
    state = {"w": torch.ones(3), "step": 1, "names": ["a"], "rates": (0.1, None, True)}
    torch.save(state, tmp_path / "file.pt")
    refuse_unsafe(tmp_path / "file.pt")


def test_looking_for_a_checkpoint_without_owning_the_run_changes_nothing(two):
    flip_bit(two / "step-00000020" / FILES[1])
    before = tree(two)
    found = inspect(two, None)
    assert found is not None
    assert found.manifest["step"] == 10
    assert tree(two) == before
