"""How Triton kernels are started, and how their launches are written down without a GPU.

A launcher is an ordinary function from tensors to tensors: it allocates what the kernel fills and
calls `launch`. Three things can become of that call: the kernel runs on a GPU; it runs in Triton's
interpreter, on CPU tensors, in a process that was started with TRITON_INTERPRET=1; or, inside
`recording`, it is only written down. A launcher that is recorded on meta tensors therefore says
exactly what it would start for tensors of those shapes, and `kernels.ahead_of_time` compiles that.
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
    """One start of a kernel.

    Attributes:
        kernel: the function under `triton.jit`.
        grid: its programs.
        types: Triton's type of each argument that is not a constant, by name.
        constants: values that the compiler knows, by name.
        divisible: names of arguments that are multiples of 16: aligned pointers and such integers.
        bytes: each tensor read or written once.
        flops: what the launcher counted.
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
    """Tell whether kernels run in Triton's interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_recording() -> bool:
    """Tell whether launches are only written down at the moment."""
    return _records is not None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Write launches down instead of starting them; meta tensors will do."""
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
    """Start a kernel on the arguments, or write the launch down.

    Args:
        kernel: the function under `triton.jit`; its arguments come first, its constants last.
        grid: its programs.
        arguments: tensors and numbers, in the kernel's order. Where a kernel does not use a tensor
            under its constants, any other tensor may stand in its place.
        num_warps: warps of 32 threads that work on one program.
        num_stages: loads that a loop keeps in flight. More than 1 has corrupted recurrent kernels
            on sm_100 (state-spaces/mamba issue 997, Triton 3.5.1 to 3.7.0), so it is opt-in.
        flops: floating-point operations of all programs, for the report.
        constants: what the compiler knows.
    """
    if _records is None:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    # Triton makes a constant of an integer 1 by itself.
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
    """Return the tensor, or another in the place of one that a kernel will not touch."""
    return other if given is None else given


def _type(x: Tensor | int | float) -> str:
    if isinstance(x, Tensor):
        return _TYPES[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return "i32" if abs(x) < 2**31 else "i64"


def _is_divisible(x: Tensor | int | float) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)
