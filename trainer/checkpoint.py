"""How a checkpoint comes to be, whole or not at all, and how the newest whole one is found.

A checkpoint is a folder `step-00000440/` that holds `MANIFEST.json` and the files it lists. It is
written as `step-00000440.tmp-<incarnation>/`; the rename is the commit, and nothing inside changes
after it. A damaged one is renamed to `step-00000440.bad-<reason>`, one that is kept no longer to
`step-00000440.collected` and then removed. There is no pointer file: the folder is scanned.
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
from trainer.manifest import (
    FORMAT,
    MANIFEST,
    RESERVED,
    CheckpointError,
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

# A save needs this many times the bytes of the one before it.
ROOM_FACTOR = 1.2

T = TypeVar("T")


class SupersededError(RuntimeError):
    """A later incarnation owns the run; this process must end and write nothing more."""


@dataclass(frozen=True)
class Draft:
    """What one save is to put down.

    Attributes:
        facts: goes into the manifest as it is: tokens, world layout, config hash, dataset
            fingerprint, the stream's state.
        pinned: it is never collected.
        write: puts this rank's files into the folder it is handed; called on every rank.
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
    """Why a save or a removal came to nothing; the same on every rank, and training may go on."""

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
            f"{self.path}: {self.cause}; need {self.need_bytes} bytes, free {self.free_bytes}; "
            f"{'free some room' if full else 'look at that path'}: "
            "what was committed stands, and the next save tries again"
        )


def publish(
    folder: Path, draft: Draft, group: RankGroup, owner: RunRecord | None
) -> Path | SaveFailure:
    """Commit one checkpoint or leave all as it was; every rank calls it and gets the same.

    `owner` is the record that rank 0 holds; the other ranks have none.

    Raises:
        SupersededError: the run has a later owner.
    """
    tmp: Path = folder
    try:
        tmp = _agreed(group, folder, draft, lambda: _begin(folder, draft, owner))[0]
        listed = _agreed(group, folder, draft, lambda: _write_and_sync(tmp, draft))
        # A name that one host's cache does not show yet is known to the rank that wrote it.
        names = sorted(set().union(*listed))
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
    """Find the newest whole checkpoint and put the damaged ones above it aside; for the owner only.

    Rank 0 reads and decides for all. See `inspect` for `accept` and the errors.
    """
    outcome: Found | Exception | None = None
    if group.rank == 0:
        try:
            outcome = inspect(folder, accept)
            for rejected in outcome.rejected if outcome else ():
                _quarantine(rejected)
        except (CheckpointError, OSError) as error:
            outcome = error
    outcome = group.gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def collect(
    folder: Path, keep: int, group: RankGroup, owner: RunRecord | None
) -> SaveFailure | None:
    """Remove what is kept no longer; called after a commit, acts on rank 0 alone.

    Keeps the newest `keep` and every pinned one, and does not count damaged ones. Sizes and the
    manifest's hash are checked, not contents: this incarnation has hashed the newest two itself,
    when it committed them or resumed from them. Sweeps what earlier incarnations left half done.
    """
    if group.rank != 0 or owner is None or not owner.still_owned():
        return None
    try:
        for leftover in _leftovers(folder, owner.incarnation):
            shutil.rmtree(leftover)
        unpinned = [path for path, manifest in intact(folder)[keep:] if not manifest["pinned"]]
        for path in unpinned:
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
    """Make sure that a file system can take so many bytes and files more.

    Raises:
        OSError: it cannot (ENOSPC); the message says what is missing.
    """
    left = os.statvfs(folder)
    free = left.f_bavail * left.f_frsize
    if free < need_bytes:
        raise OSError(errno.ENOSPC, f"{free} bytes free, {need_bytes} needed", str(folder))
    free = left.f_favail
    # File systems that make inodes as they go report none at all.
    if left.f_files and free < need_files:
        raise OSError(errno.ENOSPC, f"{free} inodes free, {need_files} needed", str(folder))


class _SaveFailedError(Exception):
    """Carries a SaveFailure from the rank group's agreement to `publish`."""


def _agreed(group: RankGroup, folder: Path, draft: Draft, act: Callable[[], T]) -> list[T]:
    """What `act` gives on each rank; an error of one rank is raised on all of them."""
    try:
        said = act()
    except SupersededError as error:
        said = error
    except (OSError, RuntimeError, SafetensorError) as error:
        said = _failure(error, folder, draft.step, group.rank)
    heard = group.gather(said)
    for each in heard:
        if isinstance(each, SupersededError):
            raise each
    failures = [each for each in heard if isinstance(each, SaveFailure)]
    if failures:
        # A rank that lost its peer says less than the rank whose system call failed.
        raise _SaveFailedError(min(failures, key=lambda each: (each.errno is None, each.rank)))
    return heard  # pyright: ignore[reportReturnType]


def _discard(folder: Path, tmp: Path, owner: RunRecord | None) -> None:
    """Give the room back; what cannot be removed now is swept after the next commit."""
    if owner is not None and tmp != folder:
        shutil.rmtree(tmp, ignore_errors=True)


def _failure(error: Exception, folder: Path, step: int, rank: int) -> SaveFailure:
    """Put an error into facts; a library may have wrapped the system's own error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    need = free = 0
    # Where the file system does not answer at all, the error itself has to do.
    with contextlib.suppress(OSError):
        left = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
        free = left.f_bavail * left.f_frsize
        need = _room_needed(folder)[0]
    path = str(folder if cause is None else cause.filename or folder)
    number = None if cause is None else cause.errno
    return SaveFailure(step, rank, path, number, f"{type(error).__name__}: {error}", need, free)


def _begin(folder: Path, draft: Draft, owner: RunRecord | None) -> Path:
    """Make the folder to write into; rank 0 does, and it alone has an owner."""
    final = folder / step_name(draft.step)
    if owner is None:
        return final
    _require_owned(owner)
    fault_point("save.begin")
    folder.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "this step is committed already", str(final))
    require_room(folder, *_room_needed(folder))
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
    # Also what other ranks have written: a second fsync is nearly free, and each host needs one.
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
    (tmp / MANIFEST).write_text(manifest_text(body))
    fault_point("save.manifest_written")
    sync(tmp / MANIFEST)
    for at, _, _ in os.walk(tmp):
        sync(Path(at))
    _require_owned(owner)
    fault_point("save.before_rename")
    tmp.rename(final)
    fault_point("save.renamed")
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
            "owns the run; this one has saved nothing and must end"
        )


def _room_needed(folder: Path) -> tuple[int, int]:
    """Bytes and files that the next checkpoint is taken to need, from the newest one."""
    for path in committed(folder):
        sizes = [file.stat().st_size for file in path.rglob("*")]
        return int(ROOM_FACTOR * sum(sizes)), len(sizes) + 1
    return 0, 0


def _leftovers(folder: Path, incarnation: int) -> list[Path]:
    """What was collected, and what this or an earlier incarnation did not commit."""
    tmps = {path: path.name.rpartition("-")[2] for path in folder.glob("step-*.tmp-*")}
    earlier = [path for path, end in tmps.items() if end.isdigit() and int(end) <= incarnation]
    return [*earlier, *folder.glob("step-*.collected")]


def _quarantine(rejected: Rejected) -> None:
    """Rename a damaged checkpoint out of the scan's way; a second one of its name is numbered."""
    aside = rejected.path.with_name(f"{rejected.path.name}.bad-{rejected.reason}")
    taken = len(list(aside.parent.glob(f"{aside.name}*")))
    rejected.path.rename(aside.with_name(f"{aside.name}-{taken}") if taken else aside)
    sync(aside.parent)
