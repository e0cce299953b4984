"""The embedded corpus: Python, C++ and technical prose from the installed packages.

Python is the source of the standard library and of the packages named in requirements.lock, with
the docstrings taken out; prose is those docstrings and the packages' descriptions; C++ is the
headers and sources that packages ship. Files come in the order of a hash of their name inside
their package, until each domain has its bytes; so the result follows from the lock file and the
version of Python alone.
"""

import hashlib
import itertools
import json
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

import zstandard

from data_pipelines.extract import (
    Chunk,
    ExtractedText,
    SourceFile,
    extracted,
    is_worth_reading,
    read_chunk,
)
from data_pipelines.sources import SOURCE, Document, write_jsonl_line
from data_pipelines.workers import Workers

LOCK = Path(__file__).parents[1] / "requirements.lock"
OWN = "crossladder"
STANDARD_LIBRARY = "python"

ORIGIN_SHARE = {"python": 0.15, "cpp": 0.3, "prose": 0.15}
"""Most of a domain's bytes that one package (for C++, one folder of a package) may give."""

PYTHON_SUFFIXES = frozenset([".py"])
CPP_SUFFIXES = frozenset([".h", ".hpp", ".hh", ".cuh", ".cu", ".cpp", ".cc", ".cxx", ".inl"])

_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")
_SKIPPED = re.compile(
    r"(^|/)(__pycache__|site-packages|tests?|testing|_vendor|vendored|idle_test|lib2to3)/"
    r"|_sysconfigdata|(^|/)\.\.(/|$)|^/"
)
CHUNK = 48


@dataclass(frozen=True)
class Installed:
    """The packages of the environment that the corpus is made of.

    Attributes:
        packages: version of each package that is read, by name.
        deviations: differences between the environment and the lock file.
    """

    python: str
    packages: dict[str, str]
    deviations: tuple[str, ...]
    distributions: tuple[Distribution, ...] = field(repr=False)


@dataclass(frozen=True)
class Yield:
    """Totals of a domain."""

    documents: int
    utf8_bytes: int
    duplicates: int
    full: bool


def survey(lock: Path) -> Installed:
    """Compare the environment with the lock file.

    Raises:
        RuntimeError: there is no lock file.
    """
    if not lock.is_file():
        raise RuntimeError(
            f"{lock} does not exist, but the embedded corpus is made of the packages it names; "
            "restore it, or write one with: pip freeze --exclude-editable > requirements.lock"
        )
    lines = (_LOCKED.match(line) for line in lock.read_text().splitlines())
    pinned = {_normal(line[1]): line[2] for line in lines if line}
    wanted = {name: version for name, version in pinned.items() if name != OWN}
    found = {_normal(d.name): d for d in distributions() if d.name}
    deviations = []
    for name, version in sorted(wanted.items()):
        if name not in found:
            deviations.append(f"{name}=={version} is not installed")
        elif found[name].version.partition("+")[0] != version.partition("+")[0]:
            deviations.append(f"{name} is {found[name].version}, not {version}")
    present = sorted(name for name in wanted if name in found)
    return Installed(
        platform.python_version(),
        {name: found[name].version for name in present},
        tuple(deviations),
        tuple(found[name] for name in present),
    )


def write_raw(
    installed: Installed,
    cap: int | None,
    folder: Path,
    workers: Workers,
    report: Callable[[float], None],
) -> None:
    """Write `<domain>.jsonl.zst` for each domain, up to `cap` bytes, and the totals.

    Raises:
        RuntimeError: a domain is empty.
    """
    writers = {domain: _RawWriter(folder / f"{domain}.jsonl.zst") for domain in ORIGIN_SHARE}
    try:
        found = collect(installed, cap, workers, lambda text: writers[text.domain](text), report)
    finally:
        for writer in writers.values():
            writer.close()
    for domain, came in found.items():
        if not came.documents:
            raise RuntimeError(
                f"domain {domain} of the embedded corpus is empty in this environment; "
                f"install the packages of {LOCK}, or raise dataset.domain_bytes"
            )
    facts = {
        "python": installed.python,
        "packages": installed.packages,
        "deviations_from_lock": installed.deviations,
        "domains": {domain: asdict(came) for domain, came in found.items()},
        "below_domain_bytes": sorted(d for d, came in found.items() if cap and not came.full),
    }
    (folder / SOURCE).write_text(json.dumps(facts))


def collect(
    installed: Installed,
    cap: int | None,
    workers: Workers,
    write: Callable[[ExtractedText], None],
    report: Callable[[float], None],
) -> dict[str, Yield]:
    """Pass the documents of all domains to `write`, and return the totals of each domain.

    Args:
        installed: what to read.
        cap: most bytes of a domain.
        workers: that read.
        write: called with the documents, in the order that the environment alone decides.
        report: called with the share that is done.
    """
    quotas = {domain: _DomainQuota(domain, cap) for domain in ORIGIN_SHARE}
    sources = _files(installed)
    for suffixes, domains in ((CPP_SUFFIXES, ["cpp"]), (PYTHON_SUFFIXES, ["python", "prose"])):
        mine = [file for file in sources if Path(file.name).suffix in suffixes]
        if "prose" in domains:
            for text in _descriptions(installed):
                _offer(quotas["prose"], text, write)
        chunks = _chunks(mine, [quotas[domain] for domain in domains])
        for texts in workers.map(read_chunk, chunks):
            for text in texts:
                _offer(quotas[text.domain], text, write)
            report(sum(quota.share() for quota in quotas.values()) / len(quotas))
    return {domain: quota.result() for domain, quota in quotas.items()}


class _RawWriter:
    """One file in the Pile's format."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file)

    def __call__(self, text: ExtractedText) -> None:
        self._stream.write(write_jsonl_line(Document(text.domain, text.text, text.origin)))

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()
        self._file.close()


class _DomainQuota:
    """How much of a domain was taken, in all and per origin; once full, it stays full."""

    def __init__(self, domain: str, cap: int | None) -> None:
        self.domain, self.cap = domain, cap
        self.full = False
        self.closed: set[str] = set()
        self.seen: set[bytes] = set()
        self.duplicates = self.utf8_bytes = 0
        self._of_origin: Counter[str] = Counter()

    def wants(self, file: SourceFile) -> bool:
        """Whether a file of that origin could still be taken."""
        return (
            not self.full and _group(self.domain, file.package + ":" + file.name) not in self.closed
        )

    def take(self, text: ExtractedText) -> bool:
        """Whether a text is new and fits; it is counted if so."""
        group, size = _group(self.domain, text.origin), len(text.text.encode())
        if self.full or group in self.closed:
            return False
        if text.digest in self.seen:
            self.duplicates += 1
            return False
        if self.cap is not None:
            if self.utf8_bytes + size > self.cap:
                self.full = True
                return False
            if self._of_origin[group] + size > ORIGIN_SHARE[self.domain] * self.cap:
                self.closed.add(group)
                return False
        self.seen.add(text.digest)
        self._of_origin[group] += size
        self.utf8_bytes += size
        return True

    def share(self) -> float:
        """The share of its bytes that is taken; 0 without a limit."""
        return 1.0 if self.full else self.utf8_bytes / self.cap if self.cap else 0.0

    def result(self) -> Yield:
        """Its totals."""
        return Yield(len(self.seen), self.utf8_bytes, self.duplicates, self.full)


def _offer(
    quota: _DomainQuota, text: ExtractedText, write: Callable[[ExtractedText], None]
) -> None:
    if quota.take(text):
        write(text)


def _group(domain: str, origin: str) -> str:
    """What counts as one origin: the package, or for C++ the folder inside it."""
    package, _, name = origin.partition(":")
    return "/".join([package, *name.split("/")[:3]]) if domain == "cpp" else package


def _chunks(files: Iterable[SourceFile], quotas: list[_DomainQuota]) -> Iterator[Chunk]:
    """Files that may still be needed; a generator, so that few are read in vain."""
    wanted = (file for file in files if any(quota.wants(file) for quota in quotas))
    while chunk := tuple(itertools.islice(wanted, CHUNK)):
        yield Chunk(chunk, frozenset(quota.domain for quota in quotas if not quota.full))


def _files(installed: Installed) -> list[SourceFile]:
    """All candidate files in the order of a hash of their names."""
    known = PYTHON_SUFFIXES | CPP_SUFFIXES
    files = []
    for distribution in installed.distributions:
        package = _normal(distribution.name)
        root = Path(str(distribution.locate_file("")))
        for name in map(str, distribution.files or ()):
            if name[name.rfind(".") :] in known and not _SKIPPED.search(name):
                files.append(SourceFile(f"{root}/{name}", name, package))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if not _SKIPPED.search(name):
            files.append(SourceFile(str(path), name, STANDARD_LIBRARY))
    return sorted(files, key=_place)


def _place(file: SourceFile) -> bytes:
    return hashlib.blake2b(f"{file.package}:{file.name}".encode(), digest_size=16).digest()


def _descriptions(installed: Installed) -> Iterator[ExtractedText]:
    for distribution in installed.distributions:
        package = _normal(distribution.name)
        text = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(text, str) and is_worth_reading(text, "prose"):
            yield extracted("prose", text, f"{package}:METADATA")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
