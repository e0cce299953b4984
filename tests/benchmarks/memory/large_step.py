"""One training step of every named architecture at a size worth training: `make large`.

python -m tests.benchmarks.memory.large_step
    all; 10 minutes, 10 GB; reports/large_step.json
python -m tests.benchmarks.memory.large_step mamba samba
    some; writes reports/large_step_part.json

Decoders predict next bytes, encoders hidden ones. Fails if a gradient is not finite. Each
architecture steps in a process of its own, so that the peak of its memory is its own.

A first loss is near ln V where the head knows nothing. A tied head does know something: a hidden
state that still resembles the embedding of the byte just read gives that byte a high logit (the
column `echo`), and the loss starts higher the weaker the blocks are at first. So the loss under a
head of the same scale that is drawn apart from the embedding (`apart`) is held to the bound, and
that of the model's own head is printed beside it.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data_pipelines.batch import IGNORED, Batch
from data_pipelines.masking import mask_tokens
from launch.measurements import Measurement, write_measurements
from models.activations import ADAM_BYTES, activations
from models.backbone import Backbone, build_backbone
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS
from sweeps.sizing import ADMITTED_ERROR, Shape, Sized, size_architecture
from trainer.machine import memory_bytes

ROOT = Path(__file__).parents[3]
RUNG, WARM_RUNG = "360M", "10k"
VOCABULARY, SEQ_LEN = 258, 512
"""The bytes, the end of a document, and the mask, which decoders never see."""
HIDDEN_SHARE = 0.3
SEED, THREADS, RATE = 17, 2, 1e-4
LOSS_BOUND = 0.5
"""Nats by which a first loss may miss ln V under a head drawn apart."""
SLOW_SECONDS = 90.0
MEMORY_BOUND = 1.15
"""Measured memory over the predicted, at most."""


@dataclass(frozen=True)
class Step:
    """What a step of one architecture did and took.

    Attributes:
        loss, loss_after: mean nats of the targets before the step, and after it.
        loss_apart: before the step, under a head drawn apart from the embedding.
        echo: mean logit, before the step, of the byte that each state has just read.
        seconds: of the step: forward, backward and optimizer.
        peak_bytes: memory above what the process held before the model was built, with the
            optimizer's moments in place.
        predicted_bytes: the same, as planned for: weights, gradients, moments, activations.
    """

    architecture: str
    parameters: int
    loss: float
    loss_after: float
    loss_apart: float
    echo: float
    gradient_norm: float
    finite: bool
    seconds: float
    peak_bytes: int
    predicted_bytes: int

    @property
    def miss(self) -> float:
        """Nats between the first loss under a head drawn apart and that of an even guess."""
        return abs(self.loss_apart - math.log(VOCABULARY))

    @property
    def memory_ratio(self) -> float:
        """Measured memory over the predicted."""
        return self.peak_bytes / self.predicted_bytes

    @property
    def holds(self) -> bool:
        """Whether it is a training step at all."""
        return self.finite and self.miss <= LOSS_BOUND


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.memory.large_step", description=__doc__
    )
    parser.add_argument("names", nargs="*", metavar="name", help="architectures; all if not given")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    parser.add_argument("--threads", type=int, default=THREADS, help="fewer on a busy machine")
    options = parser.parse_args(words)
    known = trained_architectures()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"unknown architectures {unknown}; known are {', '.join(known)}")
    console, steps = Console(), []
    for name in options.names or known:
        steps.append(step_alone(name, RUNG, options.threads))
        console.print(f"{name}: {steps[-1].seconds:.1f} s, loss {steps[-1].loss:.3f}")
    (options.root / "reports").mkdir(parents=True, exist_ok=True)
    target = "large_step_part" if options.names else "large_step"
    threads = Measurement("threads", options.threads, "threads")
    path = write_measurements(target, [threads, *measurements(steps)], options.root)
    console.print(step_table(steps), f"written to {path}")
    # A bound that is missed is a finding, printed as such; a step that is not finite is a failure.
    return 0 if all(step.finite for step in steps) else 1


def trained_architectures() -> list[str]:
    """The named architectures, but the one that mixes no tokens."""
    return sorted(set(read_architectures()) - {"identity"})


def causal_architectures() -> list[str]:
    """Those of them that predict next tokens."""
    named = read_architectures()
    return [name for name in trained_architectures() if named[name].model.get("form") != "encoder"]


def step_alone(name: str, rung: str, threads: int) -> Step:
    """Take the step in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(take_step, name, rung, threads).result()


def take_step(name: str, rung: str, threads: int) -> Step:
    """Build an architecture on a rung and train it by one sequence, in this process."""
    torch.set_num_threads(threads)
    # Kernels are built, and libraries take their memory, before anything is measured.
    _train(_fitted(name, WARM_RUNG, math.inf))
    fitted, before = _fitted(name, rung, ADMITTED_ERROR), memory_bytes("cpu")
    return _measured(name, fitted, _train(fitted), before)


def measurements(steps: Sequence[Step]) -> list[Measurement]:
    """The rows of the report."""
    rows = []
    for step in steps:
        name = step.architecture
        rows += [
            Measurement(f"{name}_parameters", step.parameters, "parameters"),
            Measurement(f"{name}_loss", step.loss, "nats"),
            Measurement(f"{name}_echo", step.echo, "logit"),
            Measurement(f"{name}_loss_apart", step.loss_apart, "nats"),
            Measurement(f"{name}_apart_from_even_guess", step.miss, "nats", LOSS_BOUND),
            Measurement(f"{name}_loss_after", step.loss_after, "nats", step.loss),
            Measurement(f"{name}_finite", float(step.finite), "fact", 1.0, "higher"),
            Measurement(f"{name}_gradient_norm", step.gradient_norm, "norm"),
            Measurement(f"{name}_step", step.seconds, "s", SLOW_SECONDS),
            Measurement(f"{name}_peak_memory", step.peak_bytes, "bytes"),
            Measurement(f"{name}_predicted_memory", step.predicted_bytes, "bytes"),
            Measurement(f"{name}_memory_ratio", step.memory_ratio, "ratio", MEMORY_BOUND),
        ]
    return rows


def step_table(steps: Sequence[Step]) -> Table:
    """The steps, one a line."""
    table = Table(title=f"one step at {RUNG} on {SEQ_LEN} bytes", box=None, padding=(0, 0, 0, 1))
    table.add_column("architecture", no_wrap=True)
    for head in ("M", "loss", "echo", "apart", "after", "norm", "s", "GB", "planned", "ratio", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for step in steps:
        table.add_row(
            step.architecture,
            f"{step.parameters / 1e6:.0f}",
            f"{step.loss:.2f}",
            f"{step.echo:.2f}",
            f"{step.loss_apart:.2f}",
            f"{step.loss_after:.2f}",
            f"{step.gradient_norm:.0f}",
            f"{step.seconds:.0f}",
            f"{step.peak_bytes / 1e9:.2f}",
            f"{step.predicted_bytes / 1e9:.2f}",
            f"{step.memory_ratio:.2f}",
            "holds" if step.holds else "FAILS",
        )
    return table


@dataclass(frozen=True)
class _Trained:
    loss: float
    loss_after: float
    loss_apart: float
    echo: float
    gradient_norm: float
    finite: bool
    seconds: float


def _train(fitted: Sized) -> _Trained:
    """One step, then forward and backward once more: memory peaks once there are moments."""
    backbone = build_backbone(fitted.model, SEED)
    batch = _text(hide=fitted.model.form == "encoder")
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=RATE, fused=True)
    begin = time.perf_counter()
    hidden = _hidden(backbone, batch)
    loss = _mean_nats(backbone.head(hidden), batch)
    loss.backward()
    gradients = [p.grad for p in backbone.parameters()]
    with torch.no_grad():
        apart = _mean_nats(F.linear(hidden, _head_apart(backbone)), batch).item()
        own = F.embedding(batch.tokens, backbone.embedding.weight)
        echo = (hidden * own).sum(dim=-1).mean().item()
    optimizer.step()
    seconds = time.perf_counter() - begin
    finite = all(g is not None and bool(g.isfinite().all()) for g in gradients)
    norms = torch.stack([g.norm() for g in gradients if g is not None])
    optimizer.zero_grad(set_to_none=False)
    del hidden
    after = _mean_nats(backbone.head(_hidden(backbone, batch)), batch)
    after.backward()
    return _Trained(loss.item(), after.item(), apart, echo, norms.norm().item(), finite, seconds)


def _measured(name: str, fitted: Sized, trained: _Trained, before: int) -> Step:
    peak = memory_bytes("cpu") - before
    kept = activations(fitted.model, 1, SEQ_LEN).peak(recompute=False)
    return Step(
        architecture=name,
        parameters=fitted.parameters,
        loss=trained.loss,
        loss_after=trained.loss_after,
        loss_apart=trained.loss_apart,
        echo=trained.echo,
        gradient_norm=trained.gradient_norm,
        finite=trained.finite,
        seconds=trained.seconds,
        peak_bytes=peak,
        predicted_bytes=ADAM_BYTES * fitted.parameters + kept,
    )


def _fitted(name: str, rung: str, tolerance: float) -> Sized:
    place = Shape(RUNGS[rung], VOCABULARY, SEQ_LEN)
    return size_architecture(name, read_architectures()[name], place, tolerance)


def _text(*, hide: bool) -> Batch:
    """The first bytes of this file with their next ones as targets, or with some hidden."""
    text = torch.tensor(list(Path(__file__).read_bytes()[: SEQ_LEN + 1]))[None]
    documents = torch.zeros(1, SEQ_LEN, dtype=torch.int32)
    batch = Batch(text[:, :-1], text[:, 1:], documents, np.zeros(1, dtype=np.uint64))
    return mask_tokens(batch, SEED, HIDDEN_SHARE, VOCABULARY - 1) if hide else batch


def _hidden(backbone: Backbone, batch: Batch) -> Tensor:
    return backbone(batch.tokens, WholeSequence(batch.documents))


def _mean_nats(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORED)


def _head_apart(backbone: Backbone) -> Tensor:
    """Weights like those of the embedding, drawn from another seed."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return backbone.embedding.draw("weight", generator)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
