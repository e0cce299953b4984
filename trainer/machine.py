"""Facts of this machine and checkout, for provenance, and its peak speed and memory."""

import ctypes
import functools
import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels.dispatch import describe as describe_kernels

# Options of glibc's malloc.h: allocations up to 32 MiB, the most that it allows, come from the heap
# (M_MMAP_THRESHOLD), and free memory at its end is not returned (M_TRIM_THRESHOLD).
_KEEPING = {-3: 2**25, -1: -1}

UNKNOWN = "unknown"
GIT_SECONDS = 20.0
PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "triton", "numpy", "submitit")


def provenance() -> dict[str, object]:
    """Code, packages, machine and command line of this process; what cannot be found is unknown."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": changes if changes == UNKNOWN else bool(changes),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "kernels": describe_kernels(),
        "command": sys.argv,
    }


@functools.cache
def gemm_peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square products, with the threads this process has."""
    side = 1024 if device == "cpu" else 8192
    a = torch.ones(side, side, dtype=dtype, device=device)
    b, out = torch.ones_like(a), torch.empty_like(a)
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * side**3 / best


def memory_bytes(device: str) -> int:
    """Peak memory so far: of the GPU's allocator, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones of this process.

    By default glibc gives free memory at the heap's end back to the system, and the pages of the
    next tensors are cleared and mapped anew, at each step. Tensors over 32 MiB, which it does not
    let lie in the heap, are given back at once as before: there they would leave holes.

    Returns:
        Whether it does. Settings of the user's (MALLOC_..., GLIBC_TUNABLES) and C libraries without
        `mallopt` are left alone.
    """
    library = ctypes.CDLL(None)
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if chosen or not hasattr(library, "mallopt"):
        return False
    return all(library.mallopt(option, value) for option, value in _KEEPING.items())


def _git(*words: str) -> str:
    root = Path(__file__).parent.parent
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return asked.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()
