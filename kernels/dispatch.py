"""Which implementation of a kernel runs here, and the library of compiled CPU kernels.

This is the only file that asks about devices, compilers, ninja and Triton. The CPU library is built
once per environment, torch, Python, processor and state of the sources, into `crossladder_cache`
under the environment's prefix. A build happens in a folder of its own under a file lock that the
kernel releases when its holder dies, and is published by a rename beside a checksum: a killed
build, two builders at once and a damaged library all end in one good library.
"""

import contextlib
import enum
import fcntl
import functools
import hashlib
import importlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch import Tensor

from kernels.triton_launch import interpreting, is_recording

SOURCES = pathlib.Path(__file__).parent
COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wall")
LINKER_FLAGS = ("-fopenmp",)

_OPERATORS = torch.library.Library("crossladder", "FRAGMENT")
# A plain global: torch.compile reads it, but would look behind a functools.cache, at the disk.
_native: bool | None = None


class Path(enum.Enum):
    """An implementation of a kernel."""

    TRITON = "triton"
    NATIVE = "native"
    REFERENCE = "reference"


def path_of(x: Tensor) -> Path:
    """Tell which implementation serves `x`, and make it ready.

    A CUDA tensor is served by the Triton kernels, and so is a CPU tensor where Triton interprets
    (TRITON_INTERPRET=1) and every tensor whose launches are only recorded. Any other CPU tensor is
    served by the compiled library, which the first call loads or builds, and without a compiler by
    plain torch, with one warning. On the meta device the operators know their shapes without being
    built. The kernels compute in float32, so float64 goes to the reference.
    """
    if x.dtype is torch.float64:
        return Path.REFERENCE
    if uses_triton(x):
        return Path.TRITON
    if x.is_meta:
        return Path.NATIVE
    if x.device.type == "cpu" and _serves_natively():
        return Path.NATIVE
    return Path.REFERENCE


def uses_triton(x: Tensor) -> bool:
    """Tell whether `path_of` says so, without making ready what would serve `x` otherwise."""
    if x.dtype is torch.float64:
        return False
    return x.is_cuda or is_recording() or (interpreting() and not x.is_meta)


def define_operator(
    schema: str, shapes: Callable[..., Any], launcher: str | None = None
) -> Callable[..., Any]:
    """Declare a torch operator whose CPU kernel the library brings, and say what shapes it returns.

    Args:
        schema: name, arguments and results in torch's schema language, without a namespace.
        shapes: takes the operator's arguments and returns empty tensors like its results.
        launcher: module and name of the function that starts the Triton kernel, as in
            `kernels.scans.linear_scan_triton:forward`; it takes the operator's arguments and
            returns its results. Imported at its first use: loading Triton takes a second.
    """
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    torch.library.register_fake(f"crossladder::{name}", shapes, lib=_OPERATORS)
    operator = getattr(torch.ops.crossladder, name).default
    if launcher is None:
        return operator
    module, _, function = launcher.partition(":")

    def start(*arguments: object) -> Any:  # noqa: ANN401
        return getattr(importlib.import_module(module), function)(*arguments)

    _OPERATORS.impl(name, start, "CUDA")

    def call(*arguments: object) -> Any:  # noqa: ANN401
        # The dispatcher knows neither of the two.
        return (start if is_recording() or interpreting() else operator)(*arguments)

    return call


def warm() -> None:
    """Build and load everything that the first run would otherwise build."""
    _serves_natively()


def describe() -> dict[str, str]:
    """Say what the kernels of this process are, for a run's provenance."""
    facts = {"cpu": Path.REFERENCE.value, "cuda": Path.TRITON.value}
    if _serves_natively():
        library = native_library()
        facts = {**facts, "cpu": Path.NATIVE.value, "library": library.stem}
        facts |= json.loads(_certificate(library).read_text())
    return facts


def use_extension_cache() -> None:
    """Send the builds of torch extensions by other packages, such as DeepSpeed, to our cache.

    Torch's builder waits without end for a `lock` file that a killed process left behind. Every
    process that calls this holds a shared file lock until it exits; one that finds itself alone
    removes what earlier ones left. A `TORCH_EXTENSIONS_DIR` that the user set is kept.
    """
    default = cache_folder() / "extensions"
    folder = pathlib.Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    _hold_extension_lock(folder)


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
    certificate = _certificate(library)
    if not (library.is_file() and certificate.is_file()):
        return False
    return _checksum(library) in certificate.read_text()


def _serves_natively() -> bool:
    global _native
    if _native is None:
        _native = _make_native()
    return _native


def _make_native() -> bool:
    missing = _missing_tools()
    if missing and not is_published(library_file()):
        warnings.warn(
            f"the CPU kernels need a C++ compiler and ninja; not found: {', '.join(missing)}. "
            "Scans run as plain torch, more than ten times slower, until you install it, for "
            "example with `apt-get install g++` or `pip install ninja`",
            RuntimeWarning,
            stacklevel=5,
        )
        return False
    native_library()
    return True


def _missing_tools() -> list[str]:
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
            f"{', '.join(_missing_tools())}; install what is missing"
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
        certificate.replace(_certificate(library))


def _certificate(library: pathlib.Path) -> pathlib.Path:
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


@functools.cache
def _hold_extension_lock(folder: pathlib.Path) -> IO[str]:
    """Hold the folder's shared file lock for the life of the process; the cache keeps it open."""
    file = (folder / "users.flock").open("w")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for abandoned in folder.glob("*/lock"):
            abandoned.unlink()
    fcntl.flock(file, fcntl.LOCK_SH)
    return file
