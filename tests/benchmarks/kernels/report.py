"""What the compilers make of every Triton kernel at sizes worth training, without a GPU.

python -m tests.benchmarks.kernels.report                   all architectures and rungs
python -m tests.benchmarks.kernels.report mamba --rungs 3B  some

Builds the named architectures on the meta device, writes down every launch of one repetition of
their pattern, forward and backward, as a bf16 run on packed documents makes them, and compiles each
for three generations of GPU. No named architecture has HiP: `hip` is its tree search and its
attention to listed keys. Prints registers, spills, occupancy, bytes and what bounds
the time, and writes reports/kernels.json. Ends with 1 if a kernel breaks a limit that it is not
excused from, or if an architecture cannot be recorded. Times are bounds, not measurements: bytes at
the memory's full bandwidth, each tensor read or written once, and FLOPs at the cores' peak.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.ahead_of_time import CHIPS, Chip, Compiled, compile_launch, roofline_seconds
from kernels.attention.block_sparse_attention import (
    BlockSparsity,
    block_sparse_attention,
    query_blocks,
)
from kernels.attention.hip_selection import Search, tree_search
from kernels.triton_launch import Launch, recording
from launch.measurements import Measurement, write_measurements
from models.backbone import Backbone
from models.mixers.softmax.hip import HipConfig
from models.sequences.positions import segment_ends
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture

ROOT = Path(__file__).parents[3]
RUNG_NAMES = ("360M", "1.3B", "3B")
VOCABULARY, BATCH, SEQ_LEN, DOCUMENT_TOKENS = 50_304, 8, 2_048, 600
LEAST_OCCUPANCY = {False: 0.5, True: 0.125}
"""Of kernels without and with products of matrices."""

EXCEPTIONS: Mapping[tuple[str, str], str] = {
    ("kernels.scans.selective_scan_triton:_backward_kernel", "occupancy"): (
        "0.25 at 110 registers: three shifted tiles of steps and two sums stay live over the loop "
        "of state entries. 16 channels a program reach 0.5 at 64 registers, but double the parts "
        "of the gradients of B and C, from 4 to 8 bytes a channel and token"
    ),
}
"""Limits that a kernel breaks, by its name and the limit, each with what keeping it would cost."""


@dataclass(frozen=True)
class Line:
    """One launch, compiled for one chip.

    Attributes:
        place: the rung, and the architecture that was first found to make the launch.
    """

    place: str
    launch: Launch
    chip: Chip
    compiled: Compiled

    @property
    def name(self) -> str:
        """The kernel by its module and function."""
        return name_of(self.launch)

    def broken(self) -> list[str]:
        """The limits that it breaks and is not excused from."""
        compiled, least = self.compiled, LEAST_OCCUPANCY[self.compiled.dots]
        broken = {
            "spills": compiled.spills > 0,
            "local": compiled.local > 0,
            "shared": compiled.shared > self.chip.shared_per_block,
            "occupancy": compiled.occupancy < least,
        }
        return [k for k, bad in broken.items() if bad and (self.name, k) not in EXCEPTIONS]


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    known = [*read_architectures(), *OPERATORS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.kernels.report", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="name", help="architectures; all if not given")
    parser.add_argument("--rungs", nargs="+", choices=RUNG_NAMES, default=RUNG_NAMES)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"unknown architectures {unknown}; known are {', '.join(known)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels; unset it to compile them")
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    places = {}
    for rung in options.rungs:
        places |= record_rung(rung, options.names or list(known), console.print)
    lines = compile_all(distinct(places), CHIPS)
    console.print(line_table(lines))
    for row in traffic(places):
        console.print(row, soft_wrap=True)
    return _conclude(lines, options, console)


def record_rung(
    rung: str, names: Sequence[str], tell: Callable[[str], None]
) -> dict[str, list[Launch]]:
    """The launches of each architecture on a rung, by place; tells which have none."""
    places = {}
    for name in names:
        launches = OPERATORS[name](rung) if name in OPERATORS else record_layer(name, rung)
        places[f"{rung} {name}"] = launches
        if not launches:
            tell(f"{rung} {name}: no Triton kernel")
    return places


def record_layer(name: str, rung: str, batch: int = BATCH) -> list[Launch]:
    """The launches of one repetition of an architecture's pattern, forward and backward."""
    place = Shape(RUNGS[rung], VOCABULARY, SEQ_LEN)
    model = size_architecture(name, read_architectures()[name], place).model
    with torch.device("meta"):
        backbone = Backbone(replace(model, n_layers=len(model.pattern.split())))
        tokens = torch.zeros(batch, SEQ_LEN, dtype=torch.int64)
    ids = (torch.arange(SEQ_LEN, dtype=torch.int32) // DOCUMENT_TOKENS).expand(batch, SEQ_LEN)
    sequence = _Packed(ids)
    with recording() as launches, _Autocast():
        backbone(tokens, sequence).float().sum().backward()
    return launches


def record_hip(rung: str) -> list[Launch]:
    """The launches of HiP: by row both ways, by block forward, as it is allowed."""
    size = RUNGS[rung]
    config = HipConfig(n_heads=size.n_heads)
    reach = BlockSparsity(config.key_block, config.n_sink, config.window)
    positions = torch.empty(BATCH, SEQ_LEN, dtype=torch.int64, device="meta")
    shape = (BATCH, SEQ_LEN, size.n_heads, size.d_model // size.n_heads)
    leaves = [
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(3)
    ]

    def attend(width: int) -> Tensor:
        blocks = query_blocks(positions, SEQ_LEN, width, width)
        search = Search(config.k // config.key_block, config.key_block, SEQ_LEN, exact=False)
        kept = tree_search(*leaves[:2], blocks, search)
        return block_sparse_attention(*leaves, kept, blocks, reach)

    with recording() as launches:
        attend(1).sum().backward()
        attend(config.query_block)
    return launches


OPERATORS: Mapping[str, Callable[[str], list[Launch]]] = {"hip": record_hip}
"""What is recorded without an architecture around it."""


def distinct(places: Mapping[str, Sequence[Launch]]) -> list[tuple[str, Launch]]:
    """Each launch once, with the first place that makes it."""
    first: dict[tuple, tuple[str, Launch]] = {}
    for place, launches in places.items():
        for each in launches:
            first.setdefault(_identity(each), (place, each))
    return list(first.values())


def compile_all(launches: Sequence[tuple[str, Launch]], chips: Sequence[Chip]) -> list[Line]:
    """Compile every launch for every chip; launches that differ in sizes alone share a program."""
    known: dict[tuple, Compiled] = {}
    lines = []
    for place, each in launches:
        for chip in chips:
            key = (*_program(each), chip.capability)
            if key not in known:
                known[key] = compile_launch(each, chip)
            lines.append(Line(place, each, chip, known[key]))
    return lines


def name_of(launch: Launch) -> str:
    """The kernel of a launch by its module and function."""
    return f"{launch.kernel.fn.__module__}:{launch.kernel.fn.__name__}"


def traffic(places: Mapping[str, Sequence[Launch]]) -> list[str]:
    """Bytes of our selective scan beside those that mamba_ssm's kernel is documented to move.

    Documented: inputs read once and outputs written once each way, and one pair of a decay and a
    state kept per channel, state entry and 2,048 tokens (kept states are written, then read).
    """
    rows = []
    for place, launches in places.items():
        ours = [
            x for x in launches if name_of(x).startswith("kernels.scans.selective_scan_triton:")
        ]
        if not ours or "mamba" not in place:
            continue
        kept = next(x for x in ours if x.kernel.fn.__name__ == "_output_kernel")
        columns, states = kept.constants["COLUMNS"], kept.constants["STATES"]
        channels, tokens = kept.grid[2] * int(str(columns)), BATCH * SEQ_LEN
        wide, narrow = tokens * channels, tokens * int(str(states))
        pairs = 8 * BATCH * channels * int(str(states)) * -(-SEQ_LEN // 2048)
        # bf16 values, steps and outputs; float32 sums for what is shared by the channels.
        forward = 2 * (3 * wide + 2 * narrow) + pairs
        backward = 2 * (5 * wide + 2 * narrow) + pairs + 4 * 2 * narrow
        rows.append(
            f"{place}: selective scan moves {sum(x.bytes for x in ours) / 1e9:.2f} GB forward and "
            f"backward; mamba_ssm's contract is {(forward + backward) / 1e9:.2f} GB, with steps "
            "in bf16, no initial state, no documents, and sums by atomics in no fixed order"
        )
    return rows


def line_table(lines: Sequence[Line]) -> Table:
    """The launches, one a line."""
    table = Table(title=f"kernels, {BATCH} x {SEQ_LEN} tokens", box=None, pad_edge=False)
    for head in ("kernel", "rung", "chip", "grid"):
        table.add_column(head, no_wrap=True)
    for head in ("registers", "spills", "local", "shared", "occupancy", "MB", "GFLOP"):
        table.add_column(head, justify="right")
    for head in ("us by bytes", "by FLOPs", ""):
        table.add_column(head, justify="right")
    for line in sorted(lines, key=lambda each: (each.name, each.place)):
        compiled, launch = line.compiled, line.launch
        by_bytes, by_flops = roofline_seconds(launch, compiled, line.chip)
        table.add_row(
            line.name.removeprefix("kernels."),
            line.place,
            line.chip.name,
            "x".join(map(str, launch.grid)),
            *(str(x) for x in (compiled.registers, compiled.spills, compiled.local)),
            str(compiled.shared),
            f"{compiled.occupancy:.2f}",
            f"{launch.bytes / 1e6:.0f}",
            f"{launch.flops / 1e9:.1f}",
            f"{by_bytes * 1e6:.0f}",
            f"{by_flops * 1e6:.0f}",
            ", ".join(line.broken()) or ("memory" if by_bytes >= by_flops else "cores"),
        )
    return table


def measurements(lines: Sequence[Line]) -> list[Measurement]:
    """The rows of the report."""
    rows = []
    for line in lines:
        name = f"{line.name} {line.place} {line.chip.name}"
        compiled, excused = line.compiled, (line.name, "occupancy") in EXCEPTIONS
        least = None if excused else LEAST_OCCUPANCY[compiled.dots]
        by_bytes, by_flops = roofline_seconds(line.launch, compiled, line.chip)
        rows += [
            Measurement(f"{name}: registers", compiled.registers, "registers"),
            Measurement(f"{name}: spills", compiled.spills, "bytes", 0),
            Measurement(f"{name}: local", compiled.local, "bytes", 0),
            Measurement(f"{name}: shared", compiled.shared, "bytes", line.chip.shared_per_block),
            Measurement(f"{name}: occupancy", compiled.occupancy, "share", least, "higher"),
            Measurement(f"{name}: least time", max(by_bytes, by_flops), "s"),
        ]
    return rows


def _conclude(lines: Sequence[Line], options: argparse.Namespace, console: Console) -> int:
    used = {line.name for line in lines}
    for (name, limit), reason in EXCEPTIONS.items():
        if name in used:
            console.print(f"excused: {name}, {limit}: {reason}", soft_wrap=True)
    (options.root / "reports").mkdir(parents=True, exist_ok=True)
    whole = not options.names and tuple(options.rungs) == RUNG_NAMES
    target = "kernels" if whole else "kernels_part"
    path = write_measurements(target, measurements(lines), options.root)
    broken = [line for line in lines if line.broken()]
    console.print(f"{len(lines)} lines, {len(broken)} break a limit; written to {path}")
    return 1 if broken or not lines else 0


def _identity(launch: Launch) -> tuple:
    return *_program(launch), launch.grid, launch.bytes, launch.flops


def _program(launch: Launch) -> tuple:
    """What the compiler is told."""
    return (
        name_of(launch),
        tuple(launch.types.items()),
        tuple(sorted((name, str(value)) for name, value in launch.constants.items())),
        launch.divisible,
        launch.num_warps,
        launch.num_stages,
    )


class _Packed(WholeSequence):
    """Packed documents on the meta device, where nothing can be counted: their ends are given."""

    def __init__(self, documents: Tensor) -> None:
        super().__init__(documents.to("meta"))
        self.packed = True
        self._real = WholeSequence(documents)

    def memo(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        if isinstance(key, tuple) and key[0] == "ends":
            ends = segment_ends(self._real.documents, self._real.positions(), int(key[1]))
            return ends.to("meta")
        return super().memo(key, make)


class _Autocast(TorchFunctionMode):
    """Products in bf16, as torch.autocast makes them; it does not know the meta device."""

    PRODUCTS = frozenset(
        {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum}
        | {Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> Any:
        if func in self.PRODUCTS:
            args = tuple(_lowered(x) for x in args)
        return func(*args, **(kwargs or {}))


def _lowered(x: object) -> object:
    lower = isinstance(x, Tensor) and x.dtype is torch.float32
    return x.bfloat16() if lower else x


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
