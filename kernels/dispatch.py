"""Selects the implementation of a kernel: Triton, the compiled CPU library, or plain torch.

No other file asks which device or interpreter serves a tensor. How the CPU library is found and
built is in `kernels.native_library`.
"""

import enum
import importlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.derivatives import in_plain_torch
from kernels.native_library import (
    certificate_file,
    is_published,
    library_file,
    missing_tools,
    native_library,
)
from kernels.triton_launch import interpreting, is_recording

_OPERATORS = torch.library.Library("crossladder", "FRAGMENT")
# A plain global, not functools.cache: torch.compile would trace into the cached function.
_native: bool | None = None


class Path(enum.Enum):
    """An implementation of a kernel."""

    TRITON = "triton"
    NATIVE = "native"
    REFERENCE = "reference"


def path_of(x: Tensor) -> Path:
    """Return the implementation for `x`, and load or build it if necessary.

    CUDA tensors go to the Triton kernels, as do CPU tensors under TRITON_INTERPRET=1 and all
    tensors while launches are recorded. Other CPU tensors go to the compiled library or, without a
    compiler, to plain torch, with one warning. Meta tensors only need the operators' shapes. The
    kernels compute in float32, so float64 goes to the reference, as everything inside `plain_torch`
    does.
    """
    if x.dtype is torch.float64 or in_plain_torch():
        return Path.REFERENCE
    if uses_triton(x):
        return Path.TRITON
    if x.is_meta:
        return Path.NATIVE
    if x.device.type == "cpu" and _serves_natively():
        return Path.NATIVE
    return Path.REFERENCE


def uses_triton(x: Tensor) -> bool:
    """Whether `path_of` is TRITON, without loading or building the CPU library."""
    if x.dtype is torch.float64 or in_plain_torch():
        return False
    return x.is_cuda or is_recording() or (interpreting() and not x.is_meta)


def define_operator(
    schema: str, shapes: Callable[..., Any], launcher: str | None = None
) -> Callable[..., Any]:
    """Declare a torch operator; its CPU implementation is in the compiled library.

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
        # Torch's dispatcher cannot select by recording or interpreting.
        return (start if is_recording() or interpreting() else operator)(*arguments)

    return call


def warm() -> None:
    """Build and load the CPU library, which otherwise happens at the first call."""
    _serves_natively()


def describe() -> dict[str, str]:
    """Describe the kernels of this process, for a run's provenance."""
    facts = {"cpu": Path.REFERENCE.value, "cuda": Path.TRITON.value}
    if _serves_natively():
        library = native_library()
        facts = {**facts, "cpu": Path.NATIVE.value, "library": library.stem}
        facts |= json.loads(certificate_file(library).read_text())
    return facts


def _serves_natively() -> bool:
    global _native
    if _native is None:
        _native = _make_native()
    return _native


def _make_native() -> bool:
    missing = missing_tools()
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
