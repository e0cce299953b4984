"""Publish a checkpoint atomically, find the newest complete one, and delete old ones.

A checkpoint is a folder `step-00000440/` that holds `MANIFEST.json` and the files it lists. It is
written as `step-00000440.tmp-<incarnation>/`; the rename is the commit, and nothing inside changes
after it. A damaged one is renamed to `step-00000440.bad-<reason>`. One that is to be deleted is
first renamed to `step-00000440.collected`. There is no `latest` file that could be out of date: the
folder is scanned.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from data_pipelines.durable import sync
from data_pipelines.fault_points import fault_point
from trainer.exit_codes import ExitCode
from trainer.manifest import (
    FORMAT,
    MANIFEST,
    RESERVED,
    FileHash,
    Found,
    Rejected,
    committed,
    hash_file,
    inspect,
    intact,
    list_files,
    manifest_text,
    step_name,
)
from trainer.parallel import RankGroup
from trainer.record import RunRecord

FAULT_POINTS = (
    "save.begin",
    "save.tmp_made",
    "save.files_written",
    "save.files_synced",
    "save.hashed",
    "save.agreed",
    "save.manifest_written",
    "save.before_rename",
    "save.renamed",
    "save.parent_synced",
    "collect.set_aside",
    "collect.manifest_removed",
    "collect.files_removed",
)
"""Every fault point between one checkpoint and the next, in the order they are passed."""

ROOM_FACTOR = 1.2
"""Free space that a save requires, as a multiple of the previous checkpoint's size."""

T = TypeVar("T")


class SupersededError(RuntimeError):
    """A later process owns the run; this one must end and write nothing more."""


@dataclass(frozen=True)
class Draft:
    """What one save writes.

    Attributes:
        facts: goes into the manifest as it is: tokens, world layout, config hash, dataset
            fingerprint, the stream's state.
        pinned: whether it is never deleted.
        write: writes this rank's files into the folder it is given; called on every rank.
    """

    step: int
    facts: Mapping
    pinned: bool
    write: Callable[[Path], None]

    def __post_init__(self) -> None:
        taken = RESERVED & set(self.facts)
        assert not taken, f"facts of step {self.step} use the manifest's own keys: {sorted(taken)}"
        json.dumps(dict(self.facts), allow_nan=False)


@dataclass(frozen=True)
class SaveFailure:
    """Why a save or a deletion failed; the same on every rank, and training may continue."""

    step: int
    rank: int
    path: str
    errno: int | None
    cause: str
    need_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        full = self.errno in (errno.ENOSPC, errno.EDQUOT) or self.free_bytes < self.need_bytes
        return (
            f"{'disk full' if full else 'save failed'}: step {self.step}, rank {self.rank}, "
            f"{self.path}: {self.cause}; {self.need_bytes} bytes needed, {self.free_bytes} free; "
            f"{'free some disk space' if full else 'check that path'}: "
            "earlier checkpoints are intact"
        )


class SaveError(RuntimeError):
    """A checkpoint that the finished run or its branches need could not be saved."""

    exit_code = ExitCode.DISK

    def __init__(self, failure: SaveFailure) -> None:
        super().__init__(f"{failure}; rerun the same command to resume from them")


def publish(
    folder: Path, draft: Draft, group: RankGroup, owner: RunRecord | None
) -> Path | SaveFailure:
    """Commit one checkpoint or change nothing; every rank calls it and gets the same result.

    `owner` is the record that rank 0 holds; the other ranks have none.

    Raises:
        SupersededError: the run has a later owner.
    """
    tmp: Path = folder
    try:
        tmp = _agreed(group, folder, draft, lambda: _begin(folder, draft, owner))[0]
        listed = _agreed(group, folder, draft, lambda: _write_and_sync(tmp, draft))
        # On network file systems a host may not see yet what another one wrote; the union of all
        # lists is complete, since each file is at least in the list of the rank that wrote it.
        names = sorted(set().union(*listed))
        # Hashing is the slowest part, so ranks share it.
        share = names[group.rank :: group.ranks]
        hashed = _agreed(group, folder, draft, lambda: _hash_share(tmp, share))
        files = dict(sorted(entry for entries in hashed for entry in entries.items()))
        return _agreed(group, folder, draft, lambda: _commit(tmp, draft, files, owner))[0]
    except _SaveFailedError as failed:
        _discard(folder, tmp, owner)
        return failed.args[0]
    except SupersededError:
        _discard(folder, tmp, owner)
        raise


def newest(folder: Path, group: RankGroup, accept: Callable[[dict], bool] | None) -> Found | None:
    """Find the newest complete checkpoint and rename newer, damaged ones; for the owner only.

    Rank 0 reads and decides for all. See `inspect` for `accept` and the errors.
    """
    outcome: Found | Exception | None = None
    if group.rank == 0:
        try:
            outcome = inspect(folder, accept)
            for rejected in outcome.rejected if outcome else ():
                _quarantine(rejected)
        except (RuntimeError, OSError) as error:
            outcome = error
    outcome = group.gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def collect(
    folder: Path, keep: int, group: RankGroup, owner: RunRecord | None
) -> SaveFailure | None:
    """Delete old checkpoints; called after a commit, acts on rank 0 alone.

    Keeps the newest `keep` and every pinned one; damaged ones do not count. Only sizes and the
    manifest's own hash are checked: the newest two were hashed in full by this process, when it
    committed them or resumed from them. Also deletes what earlier processes left unfinished.
    """
    if group.rank != 0 or owner is None or not owner.still_owned():
        return None
    try:
        for leftover in _leftovers(folder, owner.incarnation):
            shutil.rmtree(leftover)
        unpinned = [path for path, manifest in intact(folder)[keep:] if not manifest["pinned"]]
        for path in unpinned:
            # Renamed first: a kill in the middle of rmtree must not leave a checkpoint that looks
            # committed but lacks files. The next collection deletes what is left.
            aside = path.rename(path.with_name(f"{path.name}.collected"))
            fault_point("collect.set_aside")
            (aside / MANIFEST).unlink()
            fault_point("collect.manifest_removed")
            shutil.rmtree(aside)
            fault_point("collect.files_removed")
    except OSError as error:
        return _failure(error, folder, step=0, rank=0)
    return None


def require_room(folder: Path, need_bytes: int, need_files: int) -> None:
    """Check that a file system has room for that many bytes and files.

    Raises:
        OSError: it has not (ENOSPC); the message says what is missing.
    """
    left = os.statvfs(folder)
    free = left.f_bavail * left.f_frsize
    if free < need_bytes:
        raise OSError(errno.ENOSPC, f"{free} bytes free, {need_bytes} needed", str(folder))
    free = left.f_favail
    # File systems that allocate inodes dynamically, such as btrfs, report zero in all.
    if left.f_files and free < need_files:
        raise OSError(errno.ENOSPC, f"{free} inodes free, {need_files} needed", str(folder))


class _SaveFailedError(Exception):
    """Carries a SaveFailure from the rank group's agreement to `publish`."""


def _agreed(group: RankGroup, folder: Path, draft: Draft, act: Callable[[], T]) -> list[T]:
    """The results of `act` on all ranks; an error of one rank is raised on all of them.

    Errors travel as values: a rank that raised before the gather would leave its peers waiting
    in it until the collective times out.
    """
    try:
        result = act()
    except SupersededError as error:
        result = error
    except (OSError, RuntimeError, SafetensorError) as error:
        result = _failure(error, folder, draft.step, group.rank)
    results = group.gather(result)
    for each in results:
        if isinstance(each, SupersededError):
            raise each
    failures = [each for each in results if isinstance(each, SaveFailure)]
    if failures:
        # The rank whose system call failed has the cause; others may only have lost their peer.
        raise _SaveFailedError(min(failures, key=lambda each: (each.errno is None, each.rank)))
    return results  # pyright: ignore[reportReturnType]


def _discard(folder: Path, tmp: Path, owner: RunRecord | None) -> None:
    """Free the disk space; what cannot be deleted now is deleted after the next commit."""
    if owner is not None and tmp != folder:
        shutil.rmtree(tmp, ignore_errors=True)


def _failure(error: Exception, folder: Path, step: int, rank: int) -> SaveFailure:
    """Describe an error; the system's own error may be wrapped in a library's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    need = free = 0
    # If the file system does not respond at all, the error itself has to do.
    with contextlib.suppress(OSError):
        left = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
        free = left.f_bavail * left.f_frsize
        need = _room_needed(folder)[0]
    path = str(folder if cause is None else cause.filename or folder)
    number = None if cause is None else cause.errno
    return SaveFailure(step, rank, path, number, f"{type(error).__name__}: {error}", need, free)


def _begin(folder: Path, draft: Draft, owner: RunRecord | None) -> Path:
    """Create the temporary folder, on rank 0, which alone has an owner."""
    final = folder / step_name(draft.step)
    if owner is None:
        return final
    _require_owned(owner)
    fault_point("save.begin")
    folder.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "this step is committed already", str(final))
    require_room(folder, *_room_needed(folder))
    # The incarnation keeps a superseded process, which may still be writing, out of this folder.
    tmp = folder / f"{final.name}.tmp-{owner.incarnation}"
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir()
    fault_point("save.tmp_made")
    return tmp


def _write_and_sync(tmp: Path, draft: Draft) -> list[str]:
    draft.write(tmp)
    fault_point("save.files_written")
    names = list_files(tmp)
    # Every rank syncs all files: a second fsync is nearly free, and each host has its own cache.
    for name in names:
        sync(tmp / name)
    fault_point("save.files_synced")
    return names


def _hash_share(tmp: Path, names: list[str]) -> dict[str, FileHash]:
    entries = {name: hash_file(tmp / name) for name in names}
    fault_point("save.hashed")
    return entries


def _commit(tmp: Path, draft: Draft, files: dict[str, FileHash], owner: RunRecord | None) -> Path:
    final = tmp.with_name(step_name(draft.step))
    if owner is None:
        return final
    fault_point("save.agreed")
    body = {
        "format": FORMAT,
        "step": draft.step,
        "incarnation": owner.incarnation,
        "pinned": draft.pinned,
        "previous": _previous(tmp.parent),
        **draft.facts,
        "files": {name: asdict(entry) for name, entry in files.items()},
    }
    # The manifest comes last, so that it never lists a file that is not on the disk yet.
    (tmp / MANIFEST).write_text(manifest_text(body))
    fault_point("save.manifest_written")
    sync(tmp / MANIFEST)
    for at, _, _ in os.walk(tmp):
        sync(Path(at))
    # Checked again right before the commit: the save may have taken minutes.
    _require_owned(owner)
    fault_point("save.before_rename")
    tmp.rename(final)
    fault_point("save.renamed")
    # Without it the rename itself may be lost in a power failure.
    sync(tmp.parent)
    fault_point("save.parent_synced")
    return final


def _previous(folder: Path) -> str | None:
    """The hash of the newest committed manifest, which chains the two."""
    manifests = [path / MANIFEST for path in committed(folder) if (path / MANIFEST).is_file()]
    return hash_file(manifests[0]).sha256 if manifests else None


def _require_owned(owner: RunRecord) -> None:
    if not owner.still_owned():
        raise SupersededError(
            f"incarnation {owner.incarnation} of {owner.path} was superseded: a later process "
            "owns the run, so this one ends without saving"
        )


def _room_needed(folder: Path) -> tuple[int, int]:
    """Bytes and files that the next checkpoint will need, estimated from the newest one."""
    for path in committed(folder):
        sizes = [file.stat().st_size for file in path.rglob("*")]
        return int(ROOM_FACTOR * sum(sizes)), len(sizes) + 1
    return 0, 0


def _leftovers(folder: Path, incarnation: int) -> list[Path]:
    """Half-deleted checkpoints, and temporary folders of this and earlier incarnations."""
    tmps = {path: path.name.rpartition("-")[2] for path in folder.glob("step-*.tmp-*")}
    earlier = [path for path, end in tmps.items() if end.isdigit() and int(end) <= incarnation]
    return [*earlier, *folder.glob("step-*.collected")]


def _quarantine(rejected: Rejected) -> None:
    """Rename a damaged checkpoint so that scans skip it; a second one of its name is numbered."""
    aside = rejected.path.with_name(f"{rejected.path.name}.bad-{rejected.reason}")
    taken = len(list(aside.parent.glob(f"{aside.name}*")))
    rejected.path.rename(aside.with_name(f"{aside.name}-{taken}") if taken else aside)
    sync(aside.parent)
