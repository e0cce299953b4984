"""Checkpoints of known content to save, to damage and to compare."""

import hashlib
import json
from pathlib import Path

import torch

from trainer.checkpoint import Draft, publish
from trainer.manifest import MANIFEST, manifest_text, read_manifest, verify_files
from trainer.parallel import SoloGroup

SOLO = SoloGroup()
FILES = ("model.safetensors", "deepspeed/state/model.pt", "deepspeed/state/optimizer.pt")


def write_files(folder, step):
    for name in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".pt":
            torch.save({"name": name, "weights": torch.full((1000,), float(step))}, file)
        else:
            file.write_bytes(bytes([step % 251]) * 5000)


def draft(step, pinned=False, write=write_files, facts=None):
    return Draft(step, facts or {"tokens": 512 * step}, pinned, lambda tmp: write(tmp, step))


def save(record, *steps, pinned=()):
    for step in steps:
        saved = publish(record.checkpoints, draft(step, step in pinned), SOLO, record)
        assert isinstance(saved, Path), saved


def verify(folder):
    """The manifest of a checkpoint whose every file is as committed."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return manifest


def reseal(folder, **changes):
    """Rewrite a manifest the way somebody who knows the format would."""
    body = {**json.loads((folder / MANIFEST).read_text()), **changes}
    del body["manifest_sha256"]
    (folder / MANIFEST).write_text(manifest_text(body))


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
