"""Every causal architecture on data x sequence ranks against one rank: 20 steps, real training.

python -m tests.trainer.sequence_parallel                 all; about 3 minutes
python -m tests.trainer.sequence_parallel mamba2 hybrid   some

Fails if certificates differ, a loss by more than 2e-5, or the first gradient norm by 1e-5.
"""

import argparse
import functools
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sweeps.architecture import read_architectures
from sweeps.grammar import Experiment
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from tests.trainer.ranks import on_ranks
from tests.trainer.study import build_tiny, make, run
from trainer.record import read_run

LAYOUTS = ((2, 1), (1, 2), (2, 2))
"""Data ranks and sequence shards."""
LOSS_BOUND, NORM_BOUND = 2e-5, 1e-5
SEQ_LEN = 128
LONGER = {
    "corpus": {"seq_len": SEQ_LEN},
    "optimizer": {"batch_tokens": 8 * SEQ_LEN},
    "schedule": {"warmup_tokens": 4096},
    "budget": {"tokens": 20 * 8 * SEQ_LEN},
}
"""Twenty steps of eight sequences, which hold several documents each."""
SAVED_EVERY = 10 * 8 * SEQ_LEN
"""A save takes as long as two steps; one in the middle is enough where nothing is resumed."""


@dataclass(frozen=True)
class Agreement:
    """How far a run is from the same one on one rank.

    Attributes:
        same_samples: whether each step's certificate is equal, and what was evaluated.
        loss: largest relative difference of a training loss, over all steps.
        norm: relative difference of the first step's gradient norm.
        evaluation: largest relative difference of an evaluated loss.
    """

    same_samples: bool
    loss: float
    norm: float
    evaluation: float

    @property
    def holds(self) -> bool:
        """Whether the two are one run, up to rounding."""
        return self.same_samples and self.loss <= LOSS_BOUND and self.norm <= NORM_BOUND


def causal_architectures() -> list[str]:
    """The named architectures that predict next tokens by mixing earlier ones."""
    named = read_architectures()
    causal = {name for name, each in named.items() if each.model.get("form") != "encoder"}
    return sorted(causal - {"identity"})


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.trainer.sequence_parallel")
    parser.add_argument("names", nargs="*", metavar="name", help="architectures; all if not given")
    names = parser.parse_args(words).names or causal_architectures()
    with tempfile.TemporaryDirectory(prefix="crossladder-sequence-") as place:
        found = measure(names, Path(place))
    Console().print(agreement_table(found))
    return 0 if all(each.holds for each in found.values()) else 1


def measure(names: Sequence[str], place: Path) -> dict[tuple[str, tuple[int, int]], Agreement]:
    """Train every architecture on one rank and in all layouts."""
    root = build_tiny(place / "data")
    for layout in ((1, 1), *LAYOUTS):
        train_all([experiment(name, root, layout) for name in names], names, place / str(layout))
    return {
        (name, layout): agreement(place / str((1, 1)) / name, place / str(layout) / name)
        for name in names
        for layout in LAYOUTS
    }


def experiment(
    name: str, root: Path, layout: tuple[int, int], **execution: int | bool
) -> Experiment:
    """A small run of a named architecture over data x sequence ranks.

    At its own learning rate: at twice that, M2's filters of sines double a difference at every
    step, whether it came from ranks or from micro-batches.
    """
    data, shards = layout
    options = {"save_every_tokens": SAVED_EVERY, **execution}
    plain = make(root, LONGER, ranks=data * shards, sequence_parallel=shards, **options)
    architecture, place = read_architectures()[name], Shape(RUNGS["10k"], 257, SEQ_LEN)
    fitted = size_architecture(name, architecture, place, math.inf)
    scale = architecture.learning_rate_scale
    optimizer = replace(plain.run.optimizer, learning_rate_scale=scale)
    named = replace(plain.run, architecture=name, model=fitted.model, optimizer=optimizer)
    return replace(plain, run=named)


def train_all(experiments: Sequence[Experiment], names: Sequence[str], folder: Path) -> None:
    """Train runs of one layout, one after the other, each into a folder of its name.

    Raises:
        RuntimeError: a rank did not end well.
    """
    ranks = experiments[0].execution.ranks
    ends = on_ranks(ranks, functools.partial(_train_in_turn, experiments, names, folder))
    if any(ends):
        raise RuntimeError(f"ranks of {folder} ended with {ends}; their errors stand above")


def agreement(alone: Path, shared: Path) -> Agreement:
    """Compare the records of two runs."""
    one, many = read_run(alone), read_run(shared)
    evaluated = [
        [(r["step"], r["targets"], r["utf8_bytes"]) for r in s.evaluations] for s in (one, many)
    ]
    certificates = [[r["certificate"] for r in s.metrics] for s in (one, many)]
    assert certificates[0]
    assert evaluated[0]
    return Agreement(
        certificates[0] == certificates[1] and evaluated[0] == evaluated[1],
        max(
            _apart(a["loss_nats"], b["loss_nats"])
            for a, b in zip(one.metrics, many.metrics, strict=True)
        ),
        _apart(one.metrics[0]["gradient_norm"], many.metrics[0]["gradient_norm"]),
        max(
            _apart(a["total_nats"], b["total_nats"])
            for a, b in zip(one.evaluations, many.evaluations, strict=True)
        ),
    )


def agreement_table(found: dict[tuple[str, tuple[int, int]], Agreement]) -> Table:
    """One line for each architecture and layout."""
    table = Table(title="against one rank: largest relative differences, 20 steps, fp32", box=None)
    table.add_column("architecture", no_wrap=True)
    for head in ("data", "sequence", "samples", "loss", "first norm", "evaluation", ""):
        table.add_column(head, justify="right")
    for (name, (data, shards)), each in found.items():
        table.add_row(
            name,
            str(data),
            str(shards),
            "same" if each.same_samples else "OTHER",
            f"{each.loss:.1e}",
            f"{each.norm:.1e}",
            f"{each.evaluation:.1e}",
            "holds" if each.holds else "FAILS",
        )
    return table


def _train_in_turn(experiments: Sequence[Experiment], names: Sequence[str], folder: Path) -> None:
    for name, each in zip(names, experiments, strict=True):
        run(each, folder / name)


def _apart(one: object, other: object) -> float:
    return abs(float(other) / float(one) - 1)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
