"""A study in one file: configs, table, manifests, lock, report, each with its hash; no weights.

The same study gives the same bytes: entries are sorted and carry no times. A capsule is read
without trusting it: names may not leave the target folder, and every hash is checked.
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.tables.sweep_folder import load
from untrusted.json_text import parse_json
from untrusted.paths import PathError, inside

INDEX = "CAPSULE.json"
FORMAT = 1
OF_A_RUN = ("config.yaml", "summary.json", "provenance.json", "evaluations.jsonl", "documents.json")
OF_A_SWEEP = ("sweep.yaml", "ladder.parquet", "baselines.json")
LARGEST_CAPSULE = 2**29


@dataclass(frozen=True)
class Capsule:
    """An opened capsule: its folder and its index."""

    folder: Path
    index: dict

    @property
    def rows(self) -> pd.DataFrame:
        """The table, one row per evaluated point."""
        return pd.read_parquet(self.folder / "table.parquet")


def pack(sweep: Path, root: Path, target: Path) -> Path:
    """Write a study's capsule.

    Args:
        sweep: folder of the sweep, with its report.
        root: folder of the project, which holds the lock.
        target: the .tar.gz to write.

    Raises:
        ValueError: the folder is no sweep, has no report, or the target is no .tar.gz.
    """
    if not target.name.endswith(".tar.gz"):
        raise ValueError(f"{target} does not end in .tar.gz; give it that suffix")
    if not (sweep / "report" / "report.json").exists():
        raise ValueError(f"{sweep} has no report; run python -m analysis.report {sweep} first")
    files = dict(sorted(_contents(sweep, root)))
    index = {
        "format": FORMAT,
        "study": sweep.name,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for name, data in {INDEX: json.dumps(index, indent=1).encode(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    target.write_bytes(gzip.compress(body.getvalue(), mtime=0))
    return target


def unpack(file: Path, folder: Path) -> Capsule:
    """Open a capsule into an empty or new folder, and check every hash.

    Raises:
        ValueError: it is not a capsule, was changed, or names files outside the folder.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=_decompressed(file)) as archive:
            for entry in _checked(archive, file, folder):
                _extract(archive, entry, inside(folder, *entry.name.split("/")))
    except (tarfile.TarError, PathError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a capsule: {error}") from error
    index = _index(file, folder)
    for name, digest in index["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} in {file} is not what was packed; ask for the file again")
    return Capsule(folder, index)


def _decompressed(file: Path) -> io.BytesIO:
    """The archive, unless it is larger than any capsule."""
    with gzip.open(file) as body:
        content = body.read(LARGEST_CAPSULE + 1)
    if len(content) > LARGEST_CAPSULE:
        raise ValueError(f"{file} holds more than {LARGEST_CAPSULE >> 20} MiB; it is no capsule")
    return io.BytesIO(content)


def _checked(archive: tarfile.TarFile, file: Path, folder: Path) -> list[tarfile.TarInfo]:
    """The members of an archive, every one of them checked before the first is written."""
    found: dict[str, tarfile.TarInfo] = {}
    for entry in archive:
        if not entry.isreg() or entry.issparse():
            raise ValueError(f"{entry.name!r} in {file} is no regular file, so it is no capsule")
        inside(folder, *entry.name.split("/"))
        if entry.name in found:
            raise ValueError(f"{file} holds {entry.name!r} twice, so it is not a capsule")
        found[entry.name] = entry
    return list(found.values())


def _extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(entry)
    assert content is not None
    with content, path.open("xb") as written:
        shutil.copyfileobj(content, written)


def _index(file: Path, folder: Path) -> dict:
    path = folder / INDEX
    index = parse_json(path.read_text()) if path.is_file() else {}
    if (
        not isinstance(index, dict)
        or index.get("format") != FORMAT
        or not isinstance(index.get("files"), dict)
    ):
        raise ValueError(f"{file} is not a capsule of format {FORMAT}; pack it with this version")
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {INDEX}
    if found != set(index["files"]):
        odd = sorted(found ^ set(index["files"]))[:3]
        raise ValueError(f"{file} and its index differ in {', '.join(odd)}; ask for it again")
    return index


def _contents(sweep: Path, root: Path) -> Iterator[tuple[str, bytes]]:
    table = load(sweep)
    yield "table.csv", table.rows.to_csv(index=False, float_format="%.17g").encode()
    body = io.BytesIO()
    table.rows.to_parquet(body, index=False)
    yield "table.parquet", body.getvalue()
    yield "runs.csv", table.runs.to_csv(index=False).encode()
    yield "requirements.lock", (root / "requirements.lock").read_bytes()
    for name in OF_A_SWEEP:
        if (sweep / name).exists():
            yield name, (sweep / name).read_bytes()
    for file in sorted((sweep / "report").rglob("*")):
        if file.is_file():
            yield str(file.relative_to(sweep)), file.read_bytes()
    for run in sorted(sweep.glob("*/config.yaml")):
        for name in OF_A_RUN:
            if (run.parent / name).exists():
                yield f"runs/{run.parent.name}/{name}", (run.parent / name).read_bytes()
        for file in sorted(run.parent.glob("checkpoints/*/MANIFEST.json")):
            yield f"runs/{file.relative_to(sweep)}", file.read_bytes()
