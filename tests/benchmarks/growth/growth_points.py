"""A point of the growth benchmark: a mixer or an MLP at a length, in a process of its own.

One thread and a limit on memory; a mixer of width 64, forward and backward on one sequence of one
document. Time is the process's CPU time, which other processes on the machine lengthen much less
than they do the time on the wall; of a few repetitions the fastest counts. Memory is the peak of
the resident set above what it was before. glibc asks the system anew for each tensor over 32 MB,
whose pages are then filled one by one: steps are half as slow again from some length on. So memory
is that of a first pass, and time that of passes which keep what they had.
"""

import ctypes
import multiprocessing
import resource
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from models.backbone import initialise
from models.channel import SwiGLU, SwiGLUConfig
from models.mixer import Pattern, Slot, mixer_class, mixer_kinds
from models.parts.layers import RMSNorm
from models.sequences.whole import WholeSequence

D_MODEL = 64
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "mlp": {"d_hidden": 176},
    "attention": {"n_heads": 2},
    "window": {"n_heads": 2, "window": 256},
    "scout": {"n_heads": 2, "every": 10},
    "hip": {"n_heads": 2, "k": 128, "window": 64},
    "mamba": {},
    "mamba2": {"d_state": 32, "head_dim": 32},
    "gated_recurrence": {"n_heads": 2},
    "hybrid": {"n_heads": 2, "window": 256},
    "performer": {"n_heads": 2},
    "abc": {"n_heads": 2},
    "monarch": {"filter_hidden": 16, "max_len": 65_536},
    "s4d": {},
    "hydra": {"d_state": 32, "head_dim": 32},
}
CONTROL = "mlp"
"""Grows as memory does; its line is what others are seen against."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt (malloc.h)."""
POINT_CPU_SECONDS, POINT_WALL_SECONDS = 120, 900.0
POINT_BYTES = 10 << 30
REPEAT_SECONDS, REPEATS = 1.0, 3
SETTLE_SECONDS, FEW_FAULTS = 10.0, 100
LEAST_SECONDS = 0.2
"""Clocked together: the clock of CPU time may tick every 4 ms."""


@dataclass(frozen=True)
class Point:
    """A mixer at a length."""

    mixer: str
    length: int


class Mlp(nn.Module):
    """No mixing of tokens: the channel mixer of a block behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(D_MODEL)
        self.mlp = SwiGLU(SwiGLUConfig(**FIELDS[CONTROL]), D_MODEL, 2)

    def forward(self, x: Tensor, sequence: WholeSequence) -> Tensor:
        """Treat each token by itself."""
        del sequence
        return x + self.mlp(self.norm(x))


def build(kind: str) -> nn.Module:
    """The small mixer of a kind, causal where it can be, or the MLP."""
    if kind == CONTROL:
        module = Mlp()
    else:
        causal = Pattern.CAUSAL_SELF in mixer_class(kind).patterns
        pattern = Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF
        module = mixer_kinds()[kind](**FIELDS[kind]).build(Slot(D_MODEL, 2, pattern))
    initialise(module, 0)
    return module


def serve_point(connection: Connection, point: Point) -> None:
    """Send seconds and bytes of a point, or why there are none."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    mixer = build(point.mixer)
    _train_once(mixer, 256)
    resource.setrlimit(resource.RLIMIT_CPU, (POINT_CPU_SECONDS, POINT_CPU_SECONDS + 5))
    room = psutil.Process().memory_info().vms + POINT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    try:
        connection.send(_measure(mixer, point.length))
    except (RuntimeError, MemoryError) as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


def _measure(mixer: torch.nn.Module, length: int) -> tuple[float, int]:
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    _train_once(mixer, length)
    peak = _peak_bytes() - before
    _keep_memory()
    _settle(mixer, length)
    times = [_train_for_a_while(mixer, length)]
    while sum(times) < REPEAT_SECONDS and len(times) < REPEATS:
        times.append(_train_for_a_while(mixer, length))
    return min(times), max(peak, 1)


def _settle(mixer: torch.nn.Module, length: int) -> None:
    """Pass until the heap has room for all that a pass needs, or this has taken long enough.

    A page that is new to the process is cleared first; how many are is the allocator's business.
    """
    seconds, faults = 0.0, FEW_FAULTS
    while faults >= FEW_FAULTS and seconds < SETTLE_SECONDS:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds += _train_once(mixer, length)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _train_for_a_while(mixer: torch.nn.Module, length: int) -> float:
    """CPU seconds of a pass, the mean of as many as the clock needs to tell them apart."""
    times = [_train_once(mixer, length)]
    while sum(times) < LEAST_SECONDS:
        times.append(_train_once(mixer, length))
    return sum(times) / len(times)


def _keep_memory() -> None:
    """Let nothing that is freed from now on go back to the system."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_MAX, 0)
    assert libc.mallopt(M_TRIM_THRESHOLD, -1)


def _train_once(mixer: torch.nn.Module, length: int) -> float:
    """CPU seconds of one pass forward and one back; inputs and gradients of weights are freed."""
    x = torch.randn(1, length, D_MODEL, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    sequence = WholeSequence(torch.zeros(1, length, dtype=torch.int32))
    begin = time.process_time()
    mixer(x, sequence).sum().backward()
    seconds = time.process_time() - begin
    mixer.zero_grad(set_to_none=True)
    return seconds


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def take(point: Point) -> tuple[float, int] | str:
    """Seconds and bytes of a point, or why there are none."""
    # Forked from a process that has loaded everything and computed nothing.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve_point, args=(sender, point), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(POINT_WALL_SECONDS):
            return f"over {POINT_WALL_SECONDS:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
            raise RuntimeError(
                f"{point} ended with exit code {process.exitcode}; its error stands above"
            ) from None
        return f"over {POINT_CPU_SECONDS} s of CPU time, or killed for memory"
    finally:
        process.kill()
        process.join()
