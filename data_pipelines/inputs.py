"""What a dataset was built from: what was read of its files, and whether they are the same now."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.config import DatasetConfig, SourceConfig
from data_pipelines.manifest import Manifest
from data_pipelines.saved_tokenizer import SavedTokenizer, read_tokenizer_file
from data_pipelines.sources import Input, files_of, left_out, list_inputs

FACTS = ".readings.json"
MAX_DOMAINS = 4096
SHOWN = 5
"""Names that a message or a record lists of many."""


@dataclass(frozen=True)
class Reading:
    """What was read of one input.

    Attributes:
        documents: those with text.
        empty: those without.
        names: the domains, as they were written, by the folders that they become.
        digest: of the content of the files, whatever their names and order.
    """

    documents: int
    empty: int
    names: dict[str, str]
    digest: str


def add_name(names: dict[str, str], folder: str, name: str) -> None:
    """Note a domain's name.

    Raises:
        RuntimeError: another domain becomes the same folder, or there are too many.
    """
    if names.setdefault(folder, name) != name:
        raise RuntimeError(
            f"the domains {names[folder]!r} and {name!r} would both be called {folder!r} in the "
            "dataset; rename one of them"
        )
    if len(names) > MAX_DOMAINS:
        raise RuntimeError(
            f"the documents have more than {MAX_DOMAINS} domains, such as {name!r}; write fewer "
            "names into pile_set_name"
        )


def digest_of(given: Input) -> str:
    """A hash of the content of an input's files, in any order and of any name."""
    total = 0
    for file in files_of(given):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16))
        total += int.from_bytes(digest.digest(), "little")
    return f"{total % (1 << 128):032x}"


def write_readings(
    folder: Path, source: SourceConfig, inputs: Sequence[Input], readings: Sequence[Reading]
) -> None:
    """Store what was read of all inputs, as a manifest's `source` repeats it.

    Raises:
        RuntimeError: two domains become the same folder.
    """
    names: dict[str, str] = {}
    for reading in readings:
        for domain, name in reading.names.items():
            add_name(names, domain, name)
    ignored = [] if source.kind == "installed" else left_out(source)
    facts = {
        "domain_names": dict(sorted(names.items())),
        "documents": sum(reading.documents for reading in readings),
        "empty_documents": sum(reading.empty for reading in readings),
        "inputs": [
            {**_size(given), "digest": reading.digest}
            for given, reading in zip(inputs, readings, strict=True)
        ],
        "inputs_without_documents": [
            given.path
            for given, reading in zip(inputs, readings, strict=True)
            if not reading.documents
        ],
        "left_out": {"files": len(ignored), "names": [str(file) for file in ignored[:SHOWN]]},
    }
    (folder / FACTS).write_text(json.dumps(facts))


def read_readings(folder: Path) -> dict:
    """What `write_readings` stored."""
    return json.loads((folder / FACTS).read_text())


def require_same_inputs(config: DatasetConfig, manifest: Manifest, folder: Path) -> None:
    """Check that the files that a dataset was built from are what they were, as far as they exist.

    Sizes and times decide; a file of another time alone is hashed.

    Raises:
        ValueError: it says which files have changed, and how.
    """
    changed = [*_changed_inputs(config.source, manifest), *_changed_tokenizer(config, manifest)]
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"dataset {folder} was built from other files: {'; '.join(changed[:SHOWN])}{more}. "
            f"Restore them, choose another dataset.name, or delete {folder} to build it anew"
        )


def _changed_inputs(source: SourceConfig, manifest: Manifest) -> list[str]:
    then = {entry["path"]: entry for entry in manifest.source.get("inputs", [])}
    # A dataset may outlive what it was built from, or be copied to a machine without it.
    if source.kind == "installed" or not then or not any(Path(p).exists() for p in source.paths):
        return []
    gone = [f"{path} is missing" for path in source.paths if not Path(path).exists()]
    if gone:
        return gone
    now = {given.path: given for given in list_inputs(source)}
    new = [f"{path} is new" for path in now if path not in then]
    gone = [f"{path} is missing" for path in then if path not in now]
    found = (_difference(entry, now[path]) for path, entry in then.items() if path in now)
    return [*new, *gone, *filter(None, found)]


def _difference(then: dict, given: Input) -> str:
    now = _size(given)
    for key in ("files", "bytes"):
        if then[key] != now[key]:
            return f"{given.path} had {then[key]} {key} and has {now[key]}"
    if then["times_ns"] != now["times_ns"] and then["digest"] != digest_of(given):
        return f"{given.path} has other content of the same size"
    return ""


def _size(given: Input) -> dict:
    states = [file.stat() for file in files_of(given)]
    return {
        "path": given.path,
        "files": len(states),
        "bytes": sum(state.st_size for state in states),
        "times_ns": sum(state.st_mtime_ns for state in states),
    }


def _changed_tokenizer(config: DatasetConfig, manifest: Manifest) -> list[str]:
    file = Path(str(config.tokenizer.path))
    if not config.tokenizer.given or not file.is_file():
        return []
    if (
        SavedTokenizer(read_tokenizer_file(file), file).fingerprint
        == manifest.tokenizer_fingerprint
    ):
        return []
    return [f"tokenizer.path {file} holds another tokenizer"]
