"""The library of compiled CPU kernels: its location, its build and its verification.

It is built once per environment, torch, Python, processor and source version, into
`crossladder_cache` under the environment's prefix. A build runs in a temporary folder, under a file
lock that the operating system releases if the builder dies, and is published by a rename together
with a checksum. So killed builds, concurrent builds and damaged files all end in a valid library.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

SOURCES = pathlib.Path(__file__).parent
# Without -ffast-math: it would reorder sums and drop NaN handling.
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wall")
LINKER_FLAGS = ("-fopenmp",)


def cache_folder() -> pathlib.Path:
    """The folder for compiled files of this environment, torch and Python."""
    places = (pathlib.Path(sys.prefix), pathlib.Path(os.path.expanduser("~")) / ".cache")  # noqa: PTH111
    root = next((place for place in places if _can_hold(place)), None) or _own_temporary()
    version = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
    return root / "crossladder_cache" / version


def _can_hold(place: pathlib.Path) -> bool:
    """Whether a folder can be written to, or created."""
    there = next(each for each in (place, *place.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK)


@functools.cache
def _own_temporary() -> pathlib.Path:
    """A temporary folder that no other user can write to: what it holds is loaded as code."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"crossladder-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700:
        return folder
    return pathlib.Path(tempfile.mkdtemp(prefix="crossladder-"))


@functools.cache
def native_library() -> pathlib.Path:
    """Load the compiled CPU kernels, building them first if necessary; return the file.

    Raises:
        RuntimeError: the compiler refuses the sources, or what it built cannot be loaded.
    """
    library = library_file()
    if not is_published(library):
        with _exclusive(library.parent):
            if not is_published(library):
                _build(library)
    try:
        torch.ops.load_library(str(library))
    except OSError:
        # The file is intact but cannot be loaded: a system library it was linked to has changed.
        with _exclusive(library.parent):
            _build(library)
        torch.ops.load_library(str(library))
    return library


def library_file() -> pathlib.Path:
    """The file of the library for these sources, flags and processor, which may not exist yet."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(" ".join(COMPILER_FLAGS + LINKER_FLAGS).encode() + _processor().encode())
    return cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"


def is_published(library: pathlib.Path) -> bool:
    """Whether the library exists and matches its checksum."""
    certificate = certificate_file(library)
    if not (library.is_file() and certificate.is_file()):
        return False
    return _checksum(library) in certificate.read_text()


def missing_tools() -> list[str]:
    """The build tools that this machine lacks."""
    missing = [] if _compiler() else ["a C++ compiler (CXX, c++, g++, clang++)"]
    return missing if _ninja() else [*missing, "ninja"]


def _compiler() -> str | None:
    """Return the compiler command; CXX may hold a launcher and arguments beside it."""
    chosen = os.environ.get("CXX")
    if chosen and shutil.which(chosen.split()[0]):
        return chosen
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _ninja() -> str | None:
    # If Python was called by its path, PATH does not include its environment's programs.
    beside = pathlib.Path(sys.executable).parent
    return shutil.which("ninja", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def _processor() -> str:
    """A description of the processor, on which `-march=native` depends."""
    listing = pathlib.Path("/proc/cpuinfo")
    if not listing.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = listing.read_text().split("\n\n")[0].splitlines()
    return "\n".join(x for x in lines if x.startswith(("model name", "flags", "Features", "CPU")))


def _build(library: pathlib.Path) -> None:
    """Compile in a fresh folder and publish; the caller holds the file lock."""
    # Imported here: it takes a second, which only a process that builds should spend.
    from torch.utils import cpp_extension

    for abandoned in library.parent.glob("build-*"):
        shutil.rmtree(abandoned)
    compiler, ninja = _compiler(), _ninja()
    if compiler is None or ninja is None:
        raise RuntimeError(
            f"{library} cannot be loaded and must be rebuilt, but this machine lacks "
            f"{', '.join(missing_tools())}; install it"
        )
    with (
        tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as folder,
        _environment(
            CXX=compiler, PATH=f"{pathlib.Path(ninja).parent}{os.pathsep}{os.environ['PATH']}"
        ),
    ):
        cpp_extension.load(
            name="crossladder_kernels",
            sources=[str(source) for source in sorted(SOURCES.rglob("*.cpp"))],
            extra_include_paths=sorted({str(header.parent) for header in SOURCES.rglob("*.h")}),
            extra_cflags=list(COMPILER_FLAGS),
            extra_ldflags=list(LINKER_FLAGS),
            build_directory=folder,
            is_python_module=False,
        )
        built = pathlib.Path(folder) / "crossladder_kernels.so"
        facts = {
            "sha256": _checksum(built),
            "compiler": _version(compiler),
            "flags": " ".join(COMPILER_FLAGS),
        }
        certificate = pathlib.Path(folder) / "certificate.json"
        certificate.write_text(json.dumps(facts))
        # Torch has already loaded the file; a rename keeps its inode, so it is not loaded twice.
        built.replace(library)
        certificate.replace(certificate_file(library))


def certificate_file(library: pathlib.Path) -> pathlib.Path:
    """The file next to a library with its checksum, compiler and flags."""
    return library.with_suffix(".json")


def _checksum(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version(compiler: str) -> str:
    answer = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
    return answer.stdout.partition("\n")[0]


@contextlib.contextmanager
def _exclusive(folder: pathlib.Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
