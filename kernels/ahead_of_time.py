"""Ahead-of-time compilation of Triton kernels for GPUs, for the Makefile's `kernels` target.

Reports registers, spills and occupancy without a GPU. Sources: NVIDIA, CUDA C++ Programming Guide
13.0, table "Technical Specifications per Compute Capability", for the limits of a multiprocessor;
NVIDIA's data sheets of the A100 80 GB SXM, the H100 SXM and the B200 for bandwidths and dense
peaks; Williams et al. 2009, "Roofline", for the bounds on time.
"""

import functools
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_launch import Launch

REGISTERS = 65_536
WARP = 32
RESERVED_SHARED = 1_024
"""Bytes of shared memory that CUDA reserves in each block."""


@dataclass(frozen=True)
class Chip:
    """A generation of GPU.

    Attributes:
        capability: 80 for sm_80.
        warps, blocks: most warps and blocks on one multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        shared_per_block: most bytes of it for one block.
        bandwidth: bytes per second of device memory.
        vector_peak: float32 FLOP/s without tensor cores.
        tensor_peak: dense bf16 FLOP/s of the tensor cores.
    """

    name: str
    capability: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    bandwidth: float
    vector_peak: float
    tensor_peak: float


CHIPS = (
    Chip("A100", 80, 64, 32, 164 * 1024, 163 * 1024, 2.039e12, 19.5e12, 312e12),
    Chip("H100", 90, 64, 32, 228 * 1024, 227 * 1024, 3.35e12, 67e12, 989e12),
    Chip("B200", 100, 64, 32, 228 * 1024, 227 * 1024, 8.0e12, 75e12, 2250e12),
)


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel uses.

    Attributes:
        registers: registers per thread.
        spills: bytes of spill stores and loads per thread.
        local: bytes of stack per thread, in device memory.
        shared: bytes of shared memory per block.
        occupancy: resident warps over a multiprocessor's maximum.
        dots: whether it uses matrix products (tl.dot).
    """

    registers: int
    spills: int
    local: int
    shared: int
    occupancy: float
    dots: bool


def compile_launch(launch: Launch, chip: Chip) -> Compiled:
    """Compile a kernel with the arguments of a launch, for a chip that need not be present."""
    names = launch.kernel.arg_names
    index = {name: (names.index(name),) for name in names}
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={index[name]: value for name, value in launch.constants.items()},
        attrs={index[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", chip.capability, WARP)
    kernel = triton.compile(source, target=target, options=options)
    registers, spills, local = _assemble(kernel.asm["ptx"])
    shared = int(kernel.metadata.shared)
    occupancy = occupancy_of(chip, registers, shared, launch.num_warps)
    dots = "tt.dot" in kernel.asm["ttir"]
    return Compiled(registers, spills, local, shared, occupancy, dots)


def roofline_seconds(launch: Launch, compiled: Compiled, chip: Chip) -> tuple[float, float]:
    """Roofline times: bytes over memory bandwidth, and FLOPs over the peak of its cores."""
    peak = chip.tensor_peak if compiled.dots else chip.vector_peak
    return launch.bytes / chip.bandwidth, launch.flops / peak


def occupancy_of(chip: Chip, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the maximum, for blocks with these registers and shared memory."""
    # Registers are allocated to warps in units of 256.
    per_warp = math.ceil(registers * WARP / 256) * 256
    by_registers = REGISTERS // (per_warp * warps)
    by_shared = chip.shared // (shared + RESERVED_SHARED)
    return warps * min(chip.blocks, chip.warps // warps, by_registers, by_shared) / chip.warps


def _assemble(ptx: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes that the assembler reports."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    program = _assembler(
        "ptxas-blackwell" if target[1] >= "sm_100" and len(target[1]) > 5 else "ptxas"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [program, "-v", f"--gpu-name={target[1]}", str(file), "-o", f"{file}.cubin"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", answer)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", answer)
    assert registers, answer
    assert spilled, answer
    return int(registers[1]), int(spilled[2]) + int(spilled[3]), int(spilled[1])


@functools.cache
def _assembler(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
