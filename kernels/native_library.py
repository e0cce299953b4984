"""The library of compiled CPU kernels: where it lies, how it is built, when it is trusted.

It is built once per environment, torch, Python, processor and state of the sources, into
`crossladder_cache` under the environment's prefix. A build happens in a folder of its own under a
file lock that the kernel releases when its holder dies, and is published by a rename beside a
checksum: a killed build, two builders at once and a damaged library all end in one good library.
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
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

SOURCES = pathlib.Path(__file__).parent


COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wall")


LINKER_FLAGS = ("-fopenmp",)


def cache_folder() -> pathlib.Path:
    """Return where compiled things of this environment, torch and Python lie."""
    prefix = pathlib.Path(sys.prefix)
    root = prefix if os.access(prefix, os.W_OK) else pathlib.Path.home() / ".cache"
    version = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
    return root / "crossladder_cache" / version


@functools.cache
def native_library() -> pathlib.Path:
    """Load the compiled CPU kernels, building them first if they are not there; return the file.

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
        # The checksum holds but the loader refuses: a system library it was linked to has changed.
        with _exclusive(library.parent):
            _build(library)
        torch.ops.load_library(str(library))
    return library


def library_file() -> pathlib.Path:
    """Return where the library for these sources, flags and this processor lies, built or not."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update(" ".join(COMPILER_FLAGS + LINKER_FLAGS).encode() + _processor().encode())
    return cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"


def is_published(library: pathlib.Path) -> bool:
    """Tell whether the library is there and whole."""
    certificate = certificate_file(library)
    if not (library.is_file() and certificate.is_file()):
        return False
    return _checksum(library) in certificate.read_text()


def missing_tools() -> list[str]:
    """What a build needs and this machine lacks, in words."""
    missing = [] if _compiler() else ["a C++ compiler (CXX, c++, g++, clang++)"]
    return missing if _ninja() else [*missing, "ninja"]


def _compiler() -> str | None:
    """Return the compiler command; CXX may hold a launcher and arguments beside it."""
    chosen = os.environ.get("CXX")
    if chosen and shutil.which(chosen.split()[0]):
        return chosen
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _ninja() -> str | None:
    # An interpreter called by its path does not have its environment's programs on PATH.
    beside = pathlib.Path(sys.executable).parent
    return shutil.which("ninja", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def _processor() -> str:
    """Return what `-march=native` depends on."""
    listing = pathlib.Path("/proc/cpuinfo")
    if not listing.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = listing.read_text().split("\n\n")[0].splitlines()
    return "\n".join(x for x in lines if x.startswith(("model name", "flags", "Features", "CPU")))


def _build(library: pathlib.Path) -> None:
    """Compile in a fresh folder and publish; the caller holds the file lock."""
    # Loading torch's builder takes a second, which only the process that builds should pay.
    from torch.utils import cpp_extension

    for abandoned in library.parent.glob("build-*"):
        shutil.rmtree(abandoned)
    compiler, ninja = _compiler(), _ninja()
    if compiler is None or ninja is None:
        raise RuntimeError(
            f"{library} cannot be loaded and must be built again, but not found: "
            f"{', '.join(missing_tools())}; install what is missing"
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
        # Torch has loaded the file already; a rename keeps it the same file to the loader.
        built.replace(library)
        certificate.replace(certificate_file(library))


def certificate_file(library: pathlib.Path) -> pathlib.Path:
    """The file beside a library that says what it was built from, with its checksum."""
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
