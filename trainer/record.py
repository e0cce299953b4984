"""The run record: the folder a run leaves behind, its files, its columns, and who may write it.

Layout of one run, `runs/<sweep>/<id>/`:

    config.yaml         the resolved RunConfig
    provenance.json     code, data, machine and the accountant's figures at each start
    metrics.jsonl       one row a step
    evaluations.jsonl   one row an evaluated set, its subset, and milestone
    documents.json      losses of each document of the evaluation sets at the end of the run
    summary.json        of a run that reached its budget or diverged; seals the row files
    STATUS.json         the current step and speed
    OWNER.json run.lock the process that writes it, its number (incarnation), if it ever saved
    checkpoints/        see trainer.checkpoint
    *.torn              ends of lines that a crash left in a file of lines

Rows are flat; a key names its unit. A column is *exact* (bit-identical after any interruption) or
*measured* (times, memory). Losses are cross-entropies, whatever else is minimised; those of rows
with `averaged` are of the moving average of the weights. This file imports no torch: a laptop reads
records with it.
"""

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from trainer.append_file import AppendFile, named_errors
from untrusted.json_text import parse_json
from untrusted.paths import refuse_links
from untrusted.yaml_text import dump_yaml, parse_yaml

Scalar = bool | int | float | str | None
Row = dict[str, Scalar]

ROW_FILES = ("metrics.jsonl", "evaluations.jsonl")
EXACT_COLUMNS = frozenset(
    [
        "step",
        "tokens",
        "learning_rate",
        "loss_nats",
        "gradient_norm",
        "skipped",
        "certificate",
        "evaluation_id",
        "evaluation_set",
        "subset",
        "blocks",
        "documents",
        "decayed",
        "averaged",
        "total_nats",
        "targets",
        "utf8_bytes",
        "bits_per_byte",
    ]
)
MEASURED_COLUMNS = frozenset(
    [
        "incarnation",
        "step_seconds",
        "data_wait_seconds",
        "tokens_per_second",
        "flops_per_second",
        "gemm_peak_share",
        "memory_bytes",
        "evaluation_seconds",
        "error",
    ]
)


_COUNTED = frozenset(["step", "steps", "loss_nats", "tokens_per_second", "incarnation"])


class RunOwnedError(RuntimeError):
    """Another live process is writing this run."""


@dataclass(frozen=True)
class StoredRun:
    """The contents of a run folder; absent files read as empty."""

    path: Path
    config: dict
    provenance: dict
    status: dict
    summary: dict
    metrics: list[Row]
    evaluations: list[Row]


class RunRecord:
    """The only writer of a run folder, which it locks for the life of the process.

    Raises:
        RunOwnedError: another live process holds the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        refuse_links(path)
        self._lock = _lock_or_refuse(path)
        self._owner = _claim(path)
        self.incarnation = int(self._owner["incarnation"])
        self._step: Scalar = None
        self._files = {name: AppendFile(path / name) for name in ROW_FILES}

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of this run lie."""
        return self.path / "checkpoints"

    @property
    def seals(self) -> dict[str, dict]:
        """Length and hash of all rows so far, by file; rows that follow do not change them."""
        return {name: asdict(file.seal) for name, file in self._files.items()}

    @property
    def saved(self) -> bool:
        """Whether a checkpoint of the run was ever published."""
        return bool(self._owner["saved"])

    def note_saved(self) -> None:
        """Remember that a checkpoint was published: a run without one has then lost it."""
        if not self.saved:
            self._owner = {**self._owner, "saved": True}
            write_json(self.path / "OWNER.json", self._owner)

    def still_owned(self) -> bool:
        """Whether no later incarnation has taken the run over."""
        owner = read_json(self.path / "OWNER.json")
        return owner.get("incarnation") == self.incarnation and owner.get("pid") == os.getpid()

    def write_config(self, config: Mapping) -> None:
        """Store the resolved RunConfig, once; a later start leaves the text as it is."""
        if not (self.path / "config.yaml").exists():
            write_atomically(self.path / "config.yaml", dump_yaml(dict(config)))

    def write_provenance(self, start: Mapping) -> None:
        """Append the facts of this start; top-level keys show the latest start."""
        stored = read_json(self.path / "provenance.json")
        starts = [*stored.get("starts", []), {"incarnation": self.incarnation, **start}]
        write_json(self.path / "provenance.json", {**start, "starts": starts})

    def append_metrics(self, row: Row) -> None:
        """Add the row of one step."""
        self._step = row["step"]
        self._append("metrics.jsonl", [row])

    def append_evaluations(self, rows: Sequence[Row]) -> None:
        """Add the rows of all sets at one milestone, in one write: all of them or none."""
        self._append("evaluations.jsonl", rows)

    def write_documents(self, evaluation_id: str, step: int, sets: Mapping[str, Mapping]) -> None:
        """Replace the losses by document: of each set the nats and the targets of its documents."""
        facts = {"evaluation_id": evaluation_id, "step": step, "sets": dict(sets)}
        write_atomically(self.path / "documents.json", json.dumps(facts, allow_nan=False) + "\n")

    def write_status(self, state: str, **facts: Scalar) -> None:
        """Replace the status; `state` is running, stopped, extended, failed, diverged or done."""
        write_json(
            self.path / "STATUS.json",
            {"state": state, **facts, "incarnation": self.incarnation, "written": _now()},
        )

    def write_failure(self, reason: str) -> None:
        """Set the status to failed, even where no new file fits on the disk."""
        step = {} if self._step is None else {"step": self._step}
        failed = {"state": "failed", **step, "error": reason, "message": reason}
        try:
            self.write_status(**failed)
        except OSError:
            # The old file's own blocks are there to be written over.
            with (self.path / "STATUS.json").open("r+") as file:
                file.write(json.dumps({**failed, "incarnation": self.incarnation}) + "\n")
                file.truncate()

    def write_summary(self, summary: Mapping) -> None:
        """Write the summary; nothing is added to the run after it."""
        self.sync()
        write_json(self.path / "summary.json", dict(summary))

    def sync(self) -> None:
        """Fsync every appended row."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Close the files and release the lock."""
        self.sync()
        for file in self._files.values():
            file.close()
        self._lock.close()

    def _append(self, name: str, rows: Sequence[Row]) -> None:
        text = ""
        for row in rows:
            unknown = set(row) - EXACT_COLUMNS - MEASURED_COLUMNS
            assert not unknown, f"undeclared columns in {name}: {sorted(unknown)}"
            stored = {key: _finite(value) for key, value in row.items()}
            text += json.dumps({**stored, "incarnation": self.incarnation}, allow_nan=False) + "\n"
        self._files[name].append(text)


def read_run(path: Path) -> StoredRun:
    """Read a run folder: for each step (and evaluation set) the row of the latest incarnation.

    Raises:
        RuntimeError: a file cannot be read; its name and what to do.
    """
    return StoredRun(
        path=path,
        config=_read_config(path / "config.yaml"),
        provenance=read_json(path / "provenance.json"),
        status=read_status(path),
        summary=read_json(path / "summary.json"),
        metrics=_latest(read_rows(path / "metrics.jsonl"), ("step",)),
        evaluations=_latest(
            read_rows(path / "evaluations.jsonl"),
            ("step", "evaluation_set", "evaluation_id", "subset"),
        ),
    )


def read_rows(path: Path) -> list[Row]:
    """Every complete row of a JSON-lines file, in the order written; a torn last line is dropped.

    Raises:
        RuntimeError: a line that is not the last one cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RuntimeError(
                f"{path} line {number} is not valid JSON: {error}; repair it, or move the file away"
            ) from error
        if not _is_row(row):
            raise RuntimeError(f"{path} line {number} is not a row; restore it from a backup")
        rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    """Whether a line holds named scalars; those of a run are counted by step and incarnation."""
    if not isinstance(row, dict) or not all(isinstance(each, Scalar) for each in row.values()):
        return False
    return all(isinstance(row.get(key, 0), int) for key in ("step", "incarnation"))


def read_status(path: Path) -> dict:
    """The status of a run folder without what is damaged in it, since nothing rests on it."""
    try:
        stored = read_json(path / "STATUS.json")
    except (RuntimeError, OSError):
        return {}
    return {k: v for k, v in stored.items() if k not in _COUNTED or isinstance(v, int | float)}


def number(row: Row, column: str) -> float:
    """A column that holds numbers.

    Raises:
        RuntimeError: it holds something else.
    """
    value = row.get(column)
    if not isinstance(value, int | float):
        raise RuntimeError(
            f"column {column} is {value!r}, which is not a number; look at the row in the record"
        )
    return float(value)


def read_json(path: Path) -> dict:
    """The object in a JSON file, or an empty one if there is no such file.

    Raises:
        RuntimeError: the file is there but holds no JSON object.
    """
    try:
        value = parse_json(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise RuntimeError(
            f"{path} is not valid JSON: {error}; restore it or move it away"
        ) from error
    if not isinstance(value, dict):
        raise RuntimeError(f"{path} is not a JSON object; restore it or move it away")
    return value


def write_json(path: Path, value: Mapping) -> None:
    """Replace a JSON file in one step that survives a crash.

    Numbers of numpy and torch become plain ones, non-finite ones null, and what JSON does not know
    becomes its text.
    """
    write_atomically(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with named_errors(path), partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        # On a full disk, a partial file must not take up the room that is left.
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _read_config(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        config = parse_yaml(path.read_text())
    except ValueError as error:
        line = " ".join(str(error).split())
        raise RuntimeError(f"{path} cannot be read: {line}; restore it from a backup") from error
    if not isinstance(config, dict) or not config:
        raise RuntimeError(f"{path} holds no configuration; restore it from a backup")
    return config


def _lock_or_refuse(path: Path) -> IO[str]:
    lock = (path / "run.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        owner = read_json(path / "OWNER.json")
        raise RunOwnedError(
            f"run {path.name} is being written by process {owner.get('pid')} on "
            f"{owner.get('host')}; wait for it, or stop it"
        ) from None
    return lock


def _claim(path: Path) -> dict:
    before = read_json(path / "OWNER.json")
    owner = {
        "incarnation": int(before.get("incarnation", 0)) + 1,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT"),
        "saved": bool(before.get("saved")),
        "claimed": _now(),
    }
    write_json(path / "OWNER.json", owner)
    return owner


def _boot_id() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def _latest(rows: list[Row], key: tuple[str, ...]) -> list[Row]:
    newest: dict[tuple[Scalar, ...], tuple[int, Row]] = {}
    for row in rows:
        place = tuple(row.get(name) for name in key)
        incarnation = int(row.get("incarnation") or 0)
        if place not in newest or incarnation >= newest[place][0]:
            newest[place] = (incarnation, row)
    # An evaluation that failed may lack its set or id, and None has no order.
    ordered = sorted(newest, key=lambda place: (place[0] or 0, *map(str, place[1:])))
    return [newest[place][1] for place in ordered]


def _finite(value: Scalar) -> Scalar:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> object:
    """A value as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | float | str | None):
        return _finite(value)
    item = getattr(value, "item", None)
    return _plain(item()) if item else str(value)


def _sync_folder(path: Path) -> None:
    """Fsync a folder, so that a rename in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
