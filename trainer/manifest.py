"""The manifest of a checkpoint, verification against it, and the search for the newest one.

`MANIFEST.json` lists every other file with its size and sha256, contains a hash of itself, and the
hash of the previous manifest. A folder with an extra, missing or changed file is rejected.
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
from torch import Tensor

from trainer.exit_codes import ExitCode
from untrusted.paths import PathError, plain_name

FORMAT = 1
MANIFEST = "MANIFEST.json"
RESERVED = frozenset(
    ["format", "step", "incarnation", "pinned", "previous", "files", "manifest_sha256"]
)

# Classes in DeepSpeed's optimizer files of ZeRO 1 to 3, beyond those that torch considers safe.
ALLOWED_GLOBALS = frozenset(
    [
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    ]
)
# These are never unpickled; every other file is searched for code before it is loaded.
INERT_SUFFIXES = frozenset([".safetensors", ".json", ".py"])

_STEP = re.compile(r"step-(\d{8,})")


MODEL_FILE = "model.safetensors"
"""The unsharded float32 weights, in every checkpoint. Where a run has a moving average of them,
it is here, and the weights themselves are in DeepSpeed's state alone."""


class CheckpointError(RuntimeError):
    """A missing or damaged checkpoint; `reason` is one word, used in a folder name."""

    exit_code = ExitCode.BAD_CHECKPOINT

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


@dataclass(frozen=True)
class FileHash:
    """Size and hash of a file, as a manifest lists them."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was skipped because it is damaged."""

    path: Path
    reason: str
    message: str


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint, and the newer, damaged ones that were skipped."""

    path: Path
    manifest: dict
    rejected: tuple[Rejected, ...]


def inspect(folder: Path, accept: Callable[[dict], bool] | None) -> Found | None:
    """Find the newest complete checkpoint, by step; changes nothing, so any process may call it.

    Args:
        folder: of the checkpoints.
        accept: whether a checkpoint is wanted, by its manifest; others are skipped, but not called
            damaged unless it raises a CheckpointError. Any other error of it ends the search.
            None accepts all.

    Raises:
        CheckpointError: there are checkpoints but none is whole. Training from scratch would
            silently discard a run, so a person has to decide.
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
            "restore one from a backup, or move the run folder away to train from scratch",
        )
    return None


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints, newest first, by step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = {path: int(match[1]) for path in paths if (match := _STEP.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def intact(folder: Path) -> list[tuple[Path, dict]]:
    """The committed checkpoints with an intact manifest and file sizes, newest first.

    Contents are not read. Damaged ones are left out, so that no good one is deleted for them.
    """
    fitting = []
    for path in committed(folder):
        # `newest` reports and renames damaged ones.
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
            sizes = f"{file.stat().st_size} bytes, but {listed[name]['bytes']} were committed"
            raise CheckpointError("size", f"{file}: {sizes}")


def verify_files(folder: Path, manifest: Mapping) -> None:
    """Check the hash of every file of a checkpoint, then search them for code.

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
    """The path of one listed file after checking its hash, for a reader of that file alone.

    Raises:
        CheckpointError: its content differs.
    """
    if hash_file(folder / name).sha256 != manifest["files"][name]["sha256"]:
        raise CheckpointError("hash", f"{folder / name}: content differs from what was committed")
    return folder / name


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint, checked against its own hash; files are not checked.

    Raises:
        CheckpointError: it is missing, edited, of another step, or lists a path outside the
            folder.
    """
    file = folder / MANIFEST
    if folder.is_symlink() or file.is_symlink():
        raise CheckpointError("link", f"{file}: is a symlink; checkpoints contain none")
    if not file.is_file():
        raise CheckpointError("manifest", f"{file}: missing")
    try:
        manifest = json.loads(file.read_bytes())
        sealed = manifest.pop("manifest_sha256", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError("manifest", f"{file}: not readable: {error}") from error
    if sealed != _seal(manifest) or not _well_formed(manifest):
        raise CheckpointError("manifest", f"{file}: edited, or not a manifest")
    if manifest["format"] != FORMAT:
        raise CheckpointError("format", f"{file}: format {manifest['format']}, known: {FORMAT}")
    if step_name(manifest["step"]) != folder.name:
        raise CheckpointError("manifest", f"{file}: belongs to step {manifest['step']}")
    for name in manifest["files"]:
        try:
            for part in name.split("/"):
                plain_name("a part of it", part)
        except PathError as error:
            raise CheckpointError(
                "path", f"{file}: lists {name!r}, which leaves the folder: {error}"
            ) from error
    return manifest


def manifest_text(body: Mapping) -> str:
    """The text of a manifest, with a hash of itself."""
    stored = json.loads(json.dumps(dict(body), allow_nan=False))
    return json.dumps({**stored, "manifest_sha256": _seal(stored)}, indent=1) + "\n"


def refuse_unsafe(file: Path) -> None:
    """Check, without unpickling a torch file, that unpickling it would run no code.

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
                raise CheckpointError(
                    "link", f"{path}: a symlink or device; checkpoints contain none"
                )
        names += [Path(at, name).relative_to(folder).as_posix() for name in files]
    return sorted(names)


def hash_file(file: Path) -> FileHash:
    """Size and sha256 of a file."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return FileHash(opened.tell(), digest.hexdigest())


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """The hash of a model's weights, as a run's summary states it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].numpy().tobytes())
    return digest.hexdigest()


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
