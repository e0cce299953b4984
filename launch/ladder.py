"""The command that lists every architecture at every rung, and how well their sizes match.

python launch/ladder.py [architecture ...] [--rungs 360M 3B] [--vocab 50304] [--context 2048]
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.measurements import Measurement, write_measurements
from models.accounting import Account, account
from models.backbone import BackboneConfig
from sweeps.architecture import ArchitectureConfig, read_architectures
from sweeps.rungs import RUNGS, Rung, find_rung
from sweeps.sizing import ADMITTED_ERROR, Shape, nominal_parameters, size_architecture
from trainer.exit_codes import ExitCode
from trainer.schema import ConfigError, suggest

ROOT = Path(__file__).parent.parent
NANO = (257, 256)
LARGE = (50_304, 2_048)
"""Vocabulary and context: bytes for the nano rungs, GPT-NeoX's padded one for the others."""
WIDTH = 150


@dataclass(frozen=True)
class Line:
    """One architecture on one rung."""

    architecture: str
    place: Shape
    model: BackboneConfig
    counts: Account

    @property
    def error(self) -> float:
        """Relative deviation of its parameters from the rung's."""
        wanted = nominal_parameters(self.place.rung, self.place.vocab_size)
        return self.counts.total_parameters / wanted - 1


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console()
    begin = time.perf_counter()
    try:
        architectures = _chosen(arguments.architecture)
        places = [_place(find_rung(name), arguments) for name in arguments.rungs or RUNGS]
        missed: list[str] = []
        lines = list(_lines(architectures, places, missed))
    except ConfigError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return int(ExitCode.BAD_CONFIG)
    took = time.perf_counter() - begin
    Console(width=max(console.width, WIDTH)).print(_table(lines), highlight=False)
    for reason in missed:
        console.print(f"no shape: {escape(reason)}", highlight=False, soft_wrap=True)
    worst = max((abs(line.error) for line in lines), default=0.0)
    console.print(
        f"{len(lines)} shapes in {took:.0f} s; largest deviation from a rung: {worst:.2%}",
        highlight=False,
    )
    measured = [
        Measurement("largest parameter error", worst, "ratio", ADMITTED_ERROR),
        Measurement("shapes of decoders out of reach", _of_decoders(missed), "shapes", 0),
        Measurement("time", took, "s", 60),
    ]
    write_measurements("ladder", measured, ROOT)
    return int(ExitCode.DONE) if not _of_decoders(missed) else 1


def _chosen(names: list[str]) -> dict[str, ArchitectureConfig]:
    """The architectures asked for; all of them by default."""
    known = read_architectures()
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown architecture {name!r}; {suggest(name, list(known))}")
    return {name: known[name] for name in names or known}


def _place(rung: Rung, arguments: argparse.Namespace) -> Shape:
    vocab_size, context = NANO if rung.parameters else LARGE
    return Shape(rung, arguments.vocab or vocab_size, arguments.context or context)


def _lines(
    architectures: dict[str, ArchitectureConfig], places: list[Shape], missed: list[str]
) -> Iterator[Line]:
    """The shapes; architectures without one within the tolerance are added to `missed`."""
    for place in places:
        for name, architecture in architectures.items():
            try:
                model = size_architecture(name, architecture, place).model
            except ConfigError as error:
                missed.append(f"{name}: {error}")
                continue
            yield Line(name, place, model, account(model, place.seq_len))


def _of_decoders(missed: list[str]) -> int:
    """How many of the missing shapes belong to decoders."""
    known = read_architectures()
    names = [reason.partition(":")[0] for reason in missed]
    return sum(known[name].model.get("form") != "encoder" for name in names)


def _table(lines: list[Line]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (
        ("rung", False), ("architecture", False), ("d_model", True), ("layers", True),
        ("inner", True), ("heads", True), ("parameters", True), ("vs rung", True),
        ("non-embedding", True), ("FLOPs/token", True), ("6 N", True),
        ("context", True), ("state bytes", True),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for line in lines:
        counts, blocks = line.counts, line.model.blocks.values()
        table.add_row(
            line.place.rung.name,
            line.architecture,
            str(line.model.d_model),
            str(line.model.n_layers),
            _each(getattr(block.channel, "d_hidden", None) for block in blocks),
            _each(getattr(block.mixer, "n_heads", None) for block in blocks),
            f"{counts.total_parameters:,}",
            f"{line.error:+.2%}",
            f"{counts.non_embedding_parameters:,}",
            f"{counts.training_flops_per_token:.3g}",
            f"{counts.training_flops_per_token_six_n:.3g}",
            str(line.place.seq_len),
            f"{counts.state_bytes:,}",
        )
    return table


def _each(values: Iterator[object]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values if isinstance(v, int))) or "-"


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/ladder.py",
        description="List the shape of every architecture at every rung, with its parameters, "
        "training FLOPs per token and decoding state. No weights are allocated.",
    )
    parser.add_argument("architecture", nargs="*", help="architectures (default: all)")
    parser.add_argument("--rungs", nargs="+", help="model sizes (default: all)")
    parser.add_argument(
        "--vocab", type=int, help="vocabulary size (default: 257 for nano rungs, else 50304)"
    )
    parser.add_argument(
        "--context", type=int, help="sequence length (default: 256 for nano rungs, else 2048)"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
