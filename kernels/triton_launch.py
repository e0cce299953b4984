"""Launching Triton kernels, and recording launches without a GPU.

A launcher is a function from tensors to tensors that allocates the outputs and calls `launch`. The
kernel then runs on a GPU, or in Triton's interpreter on CPU tensors if the process was started with
TRITON_INTERPRET=1, or, inside `recording`, the launch is only recorded. Recording a launcher on
meta tensors gives exactly the kernels and arguments for these shapes, for `kernels.ahead_of_time`.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.int8: "*i8",
}

_records: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """A recorded launch of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        grid: number of programs along each axis.
        types: Triton types of arguments that are not constants, by name.
        constants: compile-time constants, by name.
        divisible: names of pointers and integers that are multiples of 16.
        bytes: total size of the tensors, each counted once.
        flops: the launcher's count.
    """

    kernel: Any
    grid: tuple[int, ...]
    types: dict[str, str]
    constants: dict[str, object]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int
    bytes: int
    flops: int


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_recording() -> bool:
    """Whether launches are currently recorded instead of run."""
    return _records is not None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running them; works with meta tensors."""
    global _records
    before, _records = _records, []
    try:
        yield _records
    finally:
        _records = before


def launch(
    kernel: Any,  # noqa: ANN401
    grid: tuple[int, ...],
    *arguments: Tensor | int | float,
    num_warps: int = 4,
    num_stages: int = 1,
    flops: int = 0,
    **constants: object,
) -> None:
    """Run a kernel on the arguments, or record the launch.

    Args:
        kernel: the `triton.jit` function, with its constants last.
        grid: number of programs along each axis.
        arguments: tensors and numbers in the kernel's order. A tensor that the kernel does not use
            under its constants may be replaced by any other.
        num_warps: warps per program.
        num_stages: pipeline stages of loops. More than 1 has corrupted recurrent kernels on sm_100
            (state-spaces/mamba issue 997, Triton 3.5.1 to 3.7.0), so it is opt-in.
        flops: floating-point operations of all programs, for the report.
        constants: compile-time constants.
    """
    if _records is None:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    # Triton specialises an integer argument of 1 to a constant.
    ones = {name: 1 for name, x in named.items() if type(x) is int and x == 1}
    types = {name: _type(x) for name, x in named.items() if name not in ones}
    tensors = {id(x): x for x in arguments if isinstance(x, Tensor)}
    _records.append(
        Launch(
            kernel=kernel,
            grid=grid,
            types=types,
            constants=constants | ones,
            divisible=frozenset(name for name in types if _is_divisible(named[name])),
            num_warps=num_warps,
            num_stages=num_stages,
            bytes=sum(x.numel() * x.element_size() for x in tensors.values()),
            flops=flops,
        )
    )


def or_other(given: Tensor | None, other: Tensor) -> Tensor:
    """The tensor or, if it is None, a placeholder that the kernel does not read."""
    return other if given is None else given


def _type(x: Tensor | int | float) -> str:
    if isinstance(x, Tensor):
        return _TYPES[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return "i32" if abs(x) < 2**31 else "i64"


def _is_divisible(x: Tensor | int | float) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)
