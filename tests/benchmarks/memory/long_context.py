"""A context of 65,536 bytes on four ranks against one: equal losses, a quarter of the memory.

python -m tests.benchmarks.memory.long_context                   both; minutes on two free cores
python -m tests.benchmarks.memory.long_context mamba2 --ranks 2  one of them, on two ranks

Both runs are started through launch/train.py. Memory is what each rank's resident set peaks at
above its size once the engine was built: VmHWM, which is reset at that moment. Fails if a loss
differs by more than 2e-5, or if a rank of four needs more than 35 % of what the lone rank does.

glibc gives tensors over 32 MB back to the system at once, and keeps smaller ones in a heap that has
holes. The lone rank's tensors are of the first kind and a shard's of the second, so both runs are
told to give back everything over 1 MB (MALLOC_MMAP_THRESHOLD_): what is compared is what the
tensors need. Without it Mamba-2's ratio was 0.43; steps take half as long again with it.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from data_pipelines.build import build_dataset
from data_pipelines.config import DatasetConfig, SourceConfig
from launch.measurements import Measurement, write_measurements
from tests.launch.command import ROOT, environment
from trainer.record import read_run

SEQ_LEN, BLOCK_TOKENS, STEPS = 65_536, 512, 3
TEXT_BYTES = 3_000_000
LOSS_BOUND, MEMORY_BOUND = 2e-5, 0.35
POLL_SECONDS = 0.02
GIVEN_BACK = 1 << 20
# Wide and deep enough that activations outweigh what any first step takes beside them: 150 to
# 180 MB, measured at 4,096 tokens.
MODELS = {
    "mamba2": {
        "blocks": {
            "m": {
                "mixer": {"kind": "mamba2", "d_state": 32, "head_dim": 32},
                "channel": {"kind": "none"},
            }
        },
        "pattern": "m",
        "n_layers": 4,
        "d_model": 64,
    },
    "hybrid": {
        "blocks": {
            "h": {
                "mixer": {"kind": "hybrid", "n_heads": 2, "window": 64, "initial_std": None},
                "channel": {"kind": "swiglu", "d_hidden": 128, "initial_std": None},
            }
        },
        "pattern": "h",
        "n_layers": 4,
        "d_model": 64,
    },
}


@dataclass(frozen=True)
class Run:
    """What one run came to.

    Attributes:
        losses: nats of each step.
        evaluated: nats of the held-out sequence, in all.
        peaks: bytes that each rank's resident set grew by at most, by the kernel's own mark.
        sampled: the same, by looking fifty times a second.
        seconds: of the median step.
    """

    losses: list[float]
    evaluated: float
    peaks: list[int]
    sampled: list[int]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """One architecture on one rank and on several."""

    architecture: str
    alone: Run
    shared: Run

    @property
    def loss(self) -> float:
        """Largest relative difference of a loss, the held-out one included."""
        pairs = zip(self.alone.losses, self.shared.losses, strict=True)
        apart = [abs(b / a - 1) for a, b in pairs]
        return max(*apart, abs(self.shared.evaluated / self.alone.evaluated - 1))

    @property
    def memory(self) -> float:
        """Growth of the largest of the ranks over that of the lone one."""
        return max(self.shared.peaks) / self.alone.peaks[0]


@dataclass
class Watch:
    """The memory of the ranks of a command, from the moment that their engines are built.

    Attributes:
        command: process id of the command.
        built: a pattern of the file that the run writes then.
    """

    command: int
    folder: Path
    built: str = "*/provenance.json"
    levels: dict[int, int] = field(default_factory=dict)
    marks: dict[int, int] = field(default_factory=dict)
    highest: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        """Note how much each rank holds, and what is the most it held."""
        if not self.levels:
            if any(self.folder.glob(self.built)):
                self.levels = {pid: _status(pid)["VmRSS"] for pid in self._ranks()}
                for pid in self.levels:
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
            return
        for pid, level in self.levels.items():
            now = _status(pid)
            if "VmRSS" in now:
                self.marks[pid] = now["VmHWM"] - level
                self.highest[pid] = max(self.highest.get(pid, 0), now["VmRSS"] - level)

    def _ranks(self) -> list[int]:
        started = psutil.Process(self.command).children(recursive=True)
        ranks = {
            int(p.environ()["SUBMITIT_LOCAL_LOCALID"]): p.pid
            for p in started
            if "SUBMITIT_LOCAL_LOCALID" in p.environ()
        }
        return [ranks[rank] for rank in sorted(ranks)] or [self.command]


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory.long_context")
    parser.add_argument(
        "names", nargs="*", metavar="name", help="mamba2, hybrid; both if not given"
    )
    parser.add_argument("--ranks", type=int, default=4, help="that share the sequence")
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens of the context")
    options = parser.parse_args(words)
    console, found = Console(), []
    with tempfile.TemporaryDirectory(prefix="crossladder-long-") as place:
        root = build_text(Path(place))
        for name in options.names or sorted(MODELS):
            found.append(compare(name, Path(place), root, options))
            console.print(comparison_table(found[-1:]), soft_wrap=True)
    rows = [row for each in found for row in measurements(each, options.ranks)]
    if not words:
        console.print(f"written to {write_measurements('long_context', rows, ROOT)}")
    return 0 if all(row.holds is not False for row in rows) else 1


def build_text(place: Path) -> Path:
    """A dataset of the standard library's sources, in blocks far shorter than the context."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts, size = [], 0
    for file in files:
        texts.append(file.read_text(errors="replace"))
        size += len(texts[-1])
        if size > TEXT_BYTES:
            break
    with (place / "text.jsonl").open("w") as lines:
        for text in texts:
            lines.write(json.dumps({"text": text, "meta": {"pile_set_name": "python"}}) + "\n")
    source = SourceConfig("jsonl", (str(place / "text.jsonl"),))
    config = DatasetConfig("long", source, block_tokens=BLOCK_TOKENS, validation_fraction=0.15)
    build_dataset(config, place / "data", processes=1, report=lambda *_: None)
    return place / "data"


def compare(name: str, place: Path, root: Path, options: argparse.Namespace) -> Comparison:
    """Train an architecture on one rank and on several."""
    config = place / f"{name}.yaml"
    config.write_text(yaml.safe_dump(plain_run(name, root, options.seq_len)))
    alone = train_watched(config, place / f"{name}-alone", 1)
    return Comparison(name, alone, train_watched(config, place / f"{name}-shared", options.ranks))


def plain_run(name: str, root: Path, seq_len: int) -> dict[str, object]:
    """The YAML of a run of a few steps, one sequence each."""
    joined = seq_len // BLOCK_TOKENS
    return {
        "architecture": name,
        "rung": "long",
        "nominal_parameters": 200_000,
        "precision": "fp32",
        "seed": 17,
        "model": {**MODELS[name], "vocab_size": 257},
        "corpus": {
            "name": "python",
            "dataset": "long",
            "tokenizer": {"kind": "bytes"},
            "domains": {"python": 1.0},
            "seq_len": seq_len,
            "block_tokens": BLOCK_TOKENS,
            "epoch_blocks": 8 * joined,
        },
        "optimizer": {"learning_rate": 0.003, "batch_tokens": seq_len},
        "schedule": {"warmup_tokens": seq_len},
        "budget": {"tokens": STEPS * seq_len},
        "execution": {"threads": 1, "data_root": str(root)},
        "evaluation": {"blocks_per_set": joined, "batch_sequences": 1},
    }


def train_watched(config: Path, folder: Path, ranks: int) -> Run:
    """Train through the command, with an eye on the memory of its ranks.

    Raises:
        RuntimeError: it did not end well.
    """
    shape = (f"execution.ranks={ranks}", f"execution.sequence_parallel={ranks}")
    words = ("launch/train.py", str(config), *shape, f"launcher.slots={ranks}", "--runs", folder)
    with (config.parent / "output.txt").open("w") as output:
        running = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env={**environment(""), "MALLOC_MMAP_THRESHOLD_": str(GIVEN_BACK)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(running.pid, folder)
        while running.poll() is None:
            watch.look()
            time.sleep(POLL_SECONDS)
    if running.returncode != 0:
        raise RuntimeError(f"{words} failed:\n{(config.parent / 'output.txt').read_text()}")
    (record,) = (file.parent for file in folder.glob("*/summary.json"))
    stored = read_run(record)
    losses = [float(row["loss_nats"]) for row in stored.metrics]  # type: ignore[arg-type]
    seconds = sorted(float(row["step_seconds"]) for row in stored.metrics)  # type: ignore[arg-type]
    evaluated = float(stored.evaluations[-1]["total_nats"])  # type: ignore[arg-type]
    marks, highest = ([each[pid] for pid in watch.levels] for each in (watch.marks, watch.highest))
    return Run(losses, evaluated, marks, highest, seconds[len(seconds) // 2])


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Two lines for each architecture."""
    table = Table(box=None, padding=(0, 0, 0, 1))
    table.add_column("architecture", no_wrap=True)
    for head in ("ranks", "last loss", "held out", "s", "MB most", "sampled", "ratio", "apart"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in found:
        for run in (each.alone, each.shared):
            several = run is each.shared
            table.add_row(
                each.architecture,
                str(len(run.peaks)),
                f"{run.losses[-1]:.7f}",
                f"{run.evaluated:.2f}",
                f"{run.seconds:.1f}",
                f"{max(run.peaks) / 1e6:.0f}",
                f"{max(run.sampled) / 1e6:.0f}",
                f"{each.memory:.3f}" if several else "",
                f"{each.loss:.1e}" if several else "",
            )
    return table


def measurements(each: Comparison, ranks: int) -> list[Measurement]:
    """The rows of the report."""
    name = each.architecture
    bound = MEMORY_BOUND if ranks >= 4 else None
    return [
        Measurement(f"{name}_loss_difference", each.loss, "relative", LOSS_BOUND),
        Measurement(f"{name}_memory_ratio", each.memory, "ratio", bound),
        Measurement(f"{name}_memory_alone", each.alone.peaks[0], "bytes"),
        Measurement(f"{name}_memory_of_the_largest_of_{ranks}", max(each.shared.peaks), "bytes"),
        Measurement(f"{name}_step_alone", each.alone.seconds, "s"),
        Measurement(f"{name}_step_shared", each.shared.seconds, "s"),
    ]


def _status(pid: int) -> dict[str, int]:
    """Memory of a process in bytes, by the kernel's names; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {
        line.partition(":")[0]: int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("VmRSS", "VmHWM"))
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
