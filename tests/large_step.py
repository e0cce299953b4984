"""One training step of every named causal architecture at a size worth training: `make large`.

python -m tests.large_step                   all; 10 minutes, 10 GB; reports/large_step.json
python -m tests.large_step mamba samba       some; writes reports/large_step_part.json

Fails if a loss does not start near ln V or a gradient is not finite. Each architecture steps in a
process of its own, so that the peak of its memory is its own.
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

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from launch.measurements import Measurement, write_measurements
from models.activations import ADAM_BYTES, activations
from models.backbone import Backbone, build_backbone
from models.sequence import WholeSequence
from sweeps.ladder import ADMITTED_ERROR, RUNGS, Fitted, Place, fit_architecture, read_architectures
from trainer.machine import memory_bytes

ROOT = Path(__file__).parent.parent
RUNG, WARM_RUNG = "360M", "10k"
VOCABULARY, SEQ_LEN = 257, 512
SEED, THREADS, RATE = 17, 2, 1e-4
LOSS_BOUND = 0.5
"""Nats by which a first loss may miss ln V."""
SLOW_SECONDS = 90.0
MEMORY_BOUND = 1.15
"""Measured memory over the predicted, at most."""


@dataclass(frozen=True)
class Step:
    """What a step of one architecture did and took.

    Attributes:
        loss, loss_after: mean nats of the sequence before the step, and after it.
        seconds: of the step: forward, backward and optimizer.
        peak_bytes: memory above what the process held before the model was built, with the
            optimizer's moments in place.
        predicted_bytes: the same, as planned for: weights, gradients, moments, activations.
    """

    architecture: str
    parameters: int
    loss: float
    loss_after: float
    gradient_norm: float
    finite: bool
    seconds: float
    peak_bytes: int
    predicted_bytes: int

    @property
    def miss(self) -> float:
        """Nats between the first loss and that of an even guess."""
        return abs(self.loss - math.log(VOCABULARY))

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
    parser = argparse.ArgumentParser(prog="python -m tests.large_step", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="architectures; all if not given")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    parser.add_argument("--threads", type=int, default=THREADS, help="fewer on a busy machine")
    asked = parser.parse_args(words)
    known = causal_architectures()
    unknown = sorted(set(asked.names) - set(known))
    if unknown:
        parser.error(f"unknown architectures {unknown}; known are {', '.join(known)}")
    console, steps = Console(), []
    for name in asked.names or known:
        steps.append(step_alone(name, RUNG, asked.threads))
        console.print(f"{name}: {steps[-1].seconds:.1f} s, loss {steps[-1].loss:.3f}")
    (asked.root / "reports").mkdir(parents=True, exist_ok=True)
    target = "large_step_part" if asked.names else "large_step"
    threads = Measurement("threads", asked.threads, "threads")
    path = write_measurements(target, [threads, *measurements(steps)], asked.root)
    console.print(step_table(steps), f"written to {path}")
    # A bound that is missed is a finding, printed as such; a step that is not finite is a failure.
    return 0 if all(step.finite for step in steps) else 1


def causal_architectures() -> list[str]:
    """The named architectures that predict next tokens by mixing earlier ones."""
    named = read_architectures()
    causal = {name for name, each in named.items() if each.model.get("form") != "encoder"}
    return sorted(causal - {"identity"})


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
            Measurement(f"{name}_loss_from_even_guess", step.miss, "nats", LOSS_BOUND),
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
    table = Table(title=f"one step at {RUNG} on {SEQ_LEN} bytes", box=None)
    table.add_column("architecture", no_wrap=True)
    for head in ("M", "loss", "after", "norm", "s", "GB", "planned", "ratio", ""):
        table.add_column(head, justify="right")
    for step in steps:
        table.add_row(
            step.architecture,
            f"{step.parameters / 1e6:.1f}",
            f"{step.loss:.3f}",
            f"{step.loss_after:.3f}",
            f"{step.gradient_norm:.2f}",
            f"{step.seconds:.1f}",
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
    gradient_norm: float
    finite: bool
    seconds: float


def _train(fitted: Fitted) -> _Trained:
    """One step, then forward and backward once more: memory peaks once there are moments."""
    backbone, text = build_backbone(fitted.model, SEED), _text()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=RATE, fused=True)
    begin = time.perf_counter()
    loss = _mean_nats(backbone, text)
    loss.backward()
    gradients = [p.grad for p in backbone.parameters()]
    optimizer.step()
    seconds = time.perf_counter() - begin
    finite = all(g is not None and bool(g.isfinite().all()) for g in gradients)
    norms = torch.stack([g.norm() for g in gradients if g is not None])
    optimizer.zero_grad(set_to_none=False)
    after = _mean_nats(backbone, text)
    after.backward()
    return _Trained(loss.item(), after.item(), norms.norm().item(), finite, seconds)


def _measured(name: str, fitted: Fitted, trained: _Trained, before: int) -> Step:
    peak = memory_bytes("cpu") - before
    kept = activations(fitted.model, 1, SEQ_LEN).peak(recompute=False)
    return Step(
        architecture=name,
        parameters=fitted.parameters,
        loss=trained.loss,
        loss_after=trained.loss_after,
        gradient_norm=trained.gradient_norm,
        finite=trained.finite,
        seconds=trained.seconds,
        peak_bytes=peak,
        predicted_bytes=ADAM_BYTES * fitted.parameters + kept,
    )


def _fitted(name: str, rung: str, tolerance: float) -> Fitted:
    place = Place(RUNGS[rung], VOCABULARY, SEQ_LEN)
    return fit_architecture(name, read_architectures()[name], place, tolerance)


def _text() -> Tensor:
    """The first bytes of this file, one more than a sequence."""
    text = Path(__file__).read_bytes()[: SEQ_LEN + 1]
    return torch.tensor(list(text))[None]


def _mean_nats(backbone: Backbone, text: Tensor) -> Tensor:
    documents = torch.zeros(1, SEQ_LEN, dtype=torch.int32)
    logits = backbone.head(backbone(text[:, :-1], WholeSequence(documents)))
    return F.cross_entropy(logits[0], text[0, 1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
