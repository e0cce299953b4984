"""What a committed checkpoint folder holds, the proof that it still does, and the newest one.

`MANIFEST.json` lists every other file with its size and sha256, carries a hash of itself, and names
the hash of the manifest before it. A folder with a file more, less or other than that is refused.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.exit_codes import ExitCode

FORMAT = 1
MANIFEST = "MANIFEST.json"
RESERVED = frozenset(
    ["format", "step", "incarnation", "pinned", "previous", "files", "manifest_sha256"]
)

# What DeepSpeed's optimizer files of ZeRO 1 to 3 hold beyond what torch itself calls safe.
ALLOWED_GLOBALS = frozenset(
    [
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    ]
)
# Nothing unpickles these; every other file is searched for code before anybody loads it.
INERT_SUFFIXES = frozenset([".safetensors", ".json", ".py"])

_STEP = re.compile(r"step-(\d{8,})")


MODEL_FILE = "model.safetensors"
"""The unsharded float32 weights, in every checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint that is not what was committed; `reason` is one word, fit for a folder name."""

    exit_code = ExitCode.BAD_CHECKPOINT

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class FileHash:
    """Size and content of a file, as a manifest lists them."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """A checkpoint passed over because it is not what was committed."""

    path: Path
    reason: str
    message: str


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, and what was passed over on the way to it."""

    path: Path
    manifest: dict
    rejected: tuple[Rejected, ...]


def inspect(folder: Path, accept: Callable[[dict], bool] | None) -> Found | None:
    """Find the newest whole checkpoint, by step; changes nothing, so any reader may call it.

    `accept` says of a manifest whether its checkpoint is wanted; one that is not is passed over
    without being called damaged.

    Raises:
        CheckpointError: there are checkpoints but none is whole; starting anew would bury them.
    """
    rejected = []
    paths = committed(folder)
    for path in paths:
        try:
            manifest = read_manifest(path)
            if accept is None or accept(manifest):
                verify_files(path, manifest)
                return Found(path, manifest, tuple(rejected))
        except CheckpointError as error:
            rejected.append(Rejected(path, error.reason, str(error)))
        except OSError as error:
            rejected.append(Rejected(path, "unreadable", f"{path}: {error}"))
    lost = [] if paths else sorted(folder.glob("step-*.bad-*"))
    if rejected or lost:
        details = "; ".join([each.message for each in rejected] + [str(path) for path in lost])
        raise CheckpointError(
            "none",
            f"{folder} holds checkpoints but none is whole: {details}; "
            "restore one from a copy, or move the run folder away to start it anew",
        )
    return None


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints, newest first, by step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = {path: int(match[1]) for path in paths if (match := _STEP.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def intact(folder: Path) -> list[tuple[Path, dict]]:
    """The committed checkpoints whose manifest and file sizes fit, newest first; no content read.

    A damaged one is left out, so that nothing is removed on the strength of it.
    """
    fitting = []
    for path in committed(folder):
        # `newest` is who tells about the damaged ones and puts them aside.
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(path)
            verify_sizes(path, manifest)
            fitting.append((path, manifest))
    return fitting


def verify_sizes(folder: Path, manifest: Mapping) -> None:
    """Check that a checkpoint has the listed files and no other, each of the listed size.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    listed: dict[str, dict] = manifest["files"]
    present = set(list_files(folder)) - {MANIFEST}
    for name in sorted(listed.keys() | present):
        file = folder / name
        if name not in present:
            raise CheckpointError("missing", f"{file}: missing")
        if name not in listed:
            raise CheckpointError("extra", f"{file}: not in the manifest")
        if file.stat().st_size != listed[name]["bytes"]:
            sizes = f"{file.stat().st_size} bytes, committed with {listed[name]['bytes']}"
            raise CheckpointError("size", f"{file}: {sizes}")


def verify_files(folder: Path, manifest: Mapping) -> None:
    """Check every file of a checkpoint against its manifest: first all hashes, then for code.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    verify_sizes(folder, manifest)
    for name in manifest["files"]:
        verified_file(folder, manifest, name)
    for name in manifest["files"]:
        if Path(name).suffix not in INERT_SUFFIXES:
            refuse_unsafe(folder / name)


def verified_file(folder: Path, manifest: Mapping, name: str) -> Path:
    """The path of one listed file, its content as committed: for a reader that needs no other.

    Raises:
        CheckpointError: its content differs.
    """
    if hash_file(folder / name).sha256 != manifest["files"][name]["sha256"]:
        raise CheckpointError("hash", f"{folder / name}: content differs from what was committed")
    return folder / name


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint, checked against its own hash; the files are not looked at.

    Raises:
        CheckpointError: it is missing, edited, of another step, or lists a path that leaves the
            folder.
    """
    file = folder / MANIFEST
    if folder.is_symlink() or file.is_symlink():
        raise CheckpointError("link", f"{file}: reached by a link; a checkpoint holds none")
    if not file.is_file():
        raise CheckpointError("manifest", f"{file}: missing")
    try:
        manifest = json.loads(file.read_bytes())
        sealed = manifest.pop("manifest_sha256", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError("manifest", f"{file}: not readable: {error}") from error
    if sealed != _seal(manifest) or not _well_formed(manifest):
        raise CheckpointError("manifest", f"{file}: edited, or not a manifest at all")
    if manifest["format"] != FORMAT:
        raise CheckpointError("format", f"{file}: format {manifest['format']}, known: {FORMAT}")
    if step_name(manifest["step"]) != folder.name:
        raise CheckpointError("manifest", f"{file}: belongs to step {manifest['step']}")
    for name in manifest["files"]:
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError("path", f"{file}: lists {name!r}, which leaves the folder")
    return manifest


def manifest_text(body: Mapping) -> str:
    """The text of a manifest, with the hash of itself."""
    stored = json.loads(json.dumps(dict(body), allow_nan=False))
    return json.dumps({**stored, "manifest_sha256": _seal(stored)}, indent=1) + "\n"


def refuse_unsafe(file: Path) -> None:
    """Make sure that unpickling a torch file would run no code, without unpickling it.

    Raises:
        CheckpointError: names what the file would call.
    """
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError("unsafe", f"{file}: not a plain torch file: {error}") from error
    if found - ALLOWED_GLOBALS:
        calls = ", ".join(sorted(found - ALLOWED_GLOBALS))
        raise CheckpointError("unsafe", f"{file}: would call {calls} when loaded; do not load it")


def list_files(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it, sorted.

    Raises:
        CheckpointError: something there is neither a file nor a folder.
    """
    names = []
    for at, folders, files in os.walk(folder):
        for path in (Path(at, name) for name in folders + files):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CheckpointError("link", f"{path}: a link or device; a checkpoint holds none")
        names += [Path(at, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def hash_file(file: Path) -> FileHash:
    """Size and sha256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return FileHash(opened.tell(), digest.hexdigest())


def step_name(step: int) -> str:
    """The folder name of a checkpoint."""
    return f"step-{step:08d}"


def _seal(body: Mapping) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _well_formed(manifest: Mapping) -> bool:
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("step"), int):
        return False
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
