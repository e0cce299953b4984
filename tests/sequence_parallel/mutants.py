"""Mutation tests: each mutant changes one line of the product, and the comparison must detect it.

The first four are the faults of a published patch, which a test that simulates all ranks in one
process cannot find: states are exchanged once, uncorrected and outside autograd, and a shard's
first token always continues the previous document.
"""

import contextlib
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import torch
import torch.distributed as dist

from models.ranks.schemes import Scheme
from tests.sequence_parallel.compare import judge
from tests.sequence_parallel.problem import DTYPES, LAYOUTS, Problem, Solution

RECURRENT = ("mamba2", "gated_recurrence")


@dataclass(frozen=True)
class Mutant:
    """A function with one line replaced.

    Attributes:
        what: what goes wrong.
        module, path: the function.
        names: the mixers to test.
        scheme: how states go from rank to rank.
        ranks: the numbers of ranks to test.
    """

    what: str
    module: str
    path: str
    line: str
    wrong: str
    names: tuple[str, ...] = RECURRENT
    scheme: Scheme = Scheme.GATHER
    ranks: tuple[int, ...] = (2, 4)

    def problems(self) -> list[Problem]:
        """The problems on which the mutant must fail."""
        return [
            Problem(name, layout, dtype, scheme=self.scheme)
            for name in self.names
            for layout in LAYOUTS
            for dtype in DTYPES
        ]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the function inside the context.

        Raises:
            ValueError: the function does not contain the line exactly once.
        """
        owner_path, _, name = self.path.rpartition(".")
        module = importlib.import_module(self.module)
        owner = getattr(module, owner_path) if owner_path else module
        shipped = vars(owner)[name]
        source = textwrap.dedent(inspect.getsource(_function(shipped)))
        if source.count(self.line) != 1:
            raise ValueError(f"{self.path} has {source.count(self.line)} times {self.line!r}")
        changed = textwrap.indent(source.replace(self.line, self.wrong), "    ")
        # Within a function that knows the class, `super()` finds it as in a class body.
        text = f"def make(__class__):\n{changed}\n    return {name}\n"
        space: dict[str, object] = {}
        exec(compile(text, self.path, "exec"), vars(module), space)
        mutated = space["make"](owner)  # pyright: ignore[reportCallIssue]
        if isinstance(mutated, functools.cached_property):
            assert isinstance(owner, type), "properties stand in classes"
            mutated.__set_name__(owner, name)
        setattr(owner, name, mutated)
        try:
            yield
        finally:
            setattr(owner, name, shipped)


EXCHANGE, CARRY = "models.ranks.exchange", "models.ranks.carry"
PASSING = "models.ranks.state_passing"
SHARDED, RECURRENCE = "models.sequences.sharded", "models.sequences.recurrence"
MUTANTS = (
    Mutant(
        "a neighbour's state from zero is used without those of earlier ranks",
        PASSING,
        "GatherPassing.run",
        "masked(decayed, self.keep[rank, rows]) + added[rank][rows]",
        "added[rank][rows]",
    ),
    Mutant(
        "states are sent outside autograd",
        CARRY,
        "_Publish.backward",
        "passing.finish(), passing.decay",
        "0 * passing.finish(), passing.decay",
    ),
    Mutant(
        "a shard's first token always continues the previous document",
        SHARDED,
        "ShardedSequence.__init__",
        "self._row[:, begin - 1 : begin] if begin",
        "self._row[:, begin : begin + 1] if begin",
    ),
    Mutant(
        "document ids are those of the whole row, not relative to the shard",
        SHARDED,
        "ShardedSequence.__init__",
        "PADDING, documents - before)",
        "PADDING, documents)",
    ),
    Mutant(
        "states do not decay over a rank's tokens",
        PASSING,
        "Decay.factor",
        "torch.exp(log.conj() if backward else log)",
        "torch.exp(0 * log)",
    ),
    Mutant(
        "states continue into other documents",
        PASSING,
        "GatherPassing.run",
        "masked(decayed, self.keep[rank, rows])",
        "decayed",
    ),
    Mutant(
        "tokens of other documents receive the state",
        SHARDED,
        "ShardedSequence.recur",
        "self.documents == 0, 0",
        "self.documents >= 0, 0",
    ),
    Mutant(
        "the state's gradient is multiplied by the number of ranks",
        CARRY,
        "_Receive.backward",
        "carry.passing.start(d_initial,",
        "carry.passing.start(d_initial * carry.ranks.size,",
    ),
    Mutant(
        "states are sent in bfloat16",
        PASSING,
        "GatherPassing.begin",
        "packed(added, sums)",
        "packed(added, sums).bfloat16().to(real(added).dtype)",
    ),
    Mutant(
        "gradients are accumulated from the nearest rank to the farthest",
        PASSING,
        "Direction.opposite",
        "self.ahead[::-1], self.behind[::-1]",
        "self.ahead, self.behind",
    ),
    Mutant(
        "decays get no gradient from states that pass through",
        CARRY,
        "_Publish.backward",
        "return None, d_state, d_log.sum_to_size(sums.shape), None",
        "return None, d_state, 0 * d_log.sum_to_size(sums.shape), None",
    ),
    Mutant(
        "the rates of a Mamba get no gradient from states that pass through",
        CARRY,
        "_Publish.backward",
        "d_rates = (d_log * sums).sum_to_size(rates.shape)",
        "d_rates = 0 * rates",
        ("mamba", "s4d"),
    ),
    Mutant(
        "a complex state's gradient is not conjugated",
        PASSING,
        "Decay.factor",
        "torch.exp(log.conj() if backward else log)",
        "torch.exp(log)",
        ("s4d",),
    ),
    Mutant(
        "the halo of a shard's convolutions and windows is zero",
        SHARDED,
        "ShardedSequence.halo",
        "return before.masked_fill(",
        "return (0 * before).masked_fill(",
        ("window", "mamba2"),
    ),
    Mutant(
        "the halo of a shard is one token off",
        EXCHANGE,
        "Spans.before",
        "(max(0, a - left), a)",
        "(max(0, a - left - 1), max(0, a - 1))",
        ("window", "mamba2"),
    ),
    Mutant(
        "exchanged slices get no gradient",
        EXCHANGE,
        "_Exchange.backward",
        "list(d_incoming)",
        "[0 * x for x in d_incoming]",
        ("window", "attention", "scout", "monarch"),
    ),
    Mutant(
        "positions are one off after the first rank",
        SHARDED,
        "ShardedSequence.positions",
        "self._all_positions()[:, self._begin : self._end]",
        "self._all_positions()[:, self._begin : self._end] + min(1, self._begin)",
        ("attention", "scout"),
    ),
    Mutant(
        "both directions of a Hydra run from the first rank to the last",
        SHARDED,
        "ShardedSequence.recur",
        "n_reversed = len(self.documents)",
        "n_reversed = 0",
        ("hydra noncausal_self",),
    ),
    Mutant(
        "a Hydra reads the state with C of the token itself, not of the next one",
        RECURRENCE,
        "BidirectionalSsd._reading_C",
        "around[:, 2:, 1]",
        "around[:, 1:-1, 1]",
        ("hydra noncausal_self",),
    ),
    Mutant(
        "a channel's filter is another channel's",
        SHARDED,
        "ShardedSequence.convolve",
        "taps(T)[mine]",
        "taps(T)[: rows.shape[2]]",
        ("monarch",),
    ),
    Mutant(
        "a checkpoint belongs to the next document",
        SHARDED,
        "ShardedSequence.collect",
        "documents, positions = (",
        "positions, documents = (",
        ("scout",),
    ),
    Mutant(
        "a ring passes on what a rank adds, without the state it received",
        PASSING,
        "RingPassing.end",
        "self.after(direction, total[direction.rows], added)",
        "added[direction.rows]",
        scheme=Scheme.RING,
    ),
    Mutant(
        "a ring passes on the state it received, without this rank's tokens",
        PASSING,
        "RingPassing.end",
        "self.after(direction, total[direction.rows], added)",
        "total[direction.rows]",
        scheme=Scheme.RING,
    ),
    Mutant(
        "states received from far ranks do not decay over the near ones",
        PASSING,
        "DoublingPassing.receive",
        "self.decay.of(sums).applied(state, backward=self.backward)",
        "state",
        scheme=Scheme.DOUBLING,
    ),
    Mutant(
        "a rank sends its own decay, not that of all ranks in its summary",
        PASSING,
        "DoublingPassing.round",
        "own + sums",
        "own",
        scheme=Scheme.DOUBLING,
        # With four ranks no received sum is used in a later round.
        ranks=(8,),
    ),
    Mutant(
        "states of far ranks pass through documents that end at near ones",
        PASSING,
        "DoublingPassing.receive",
        "masked(passed_on, keep)",
        "passed_on",
        scheme=Scheme.DOUBLING,
    ),
)


@dataclass(frozen=True)
class Caught:
    """A tested mutant: the largest error over its tolerance, by dtype."""

    mutant: Mutant
    ranks: int
    margins: dict[str, float]


def mutant_problems() -> list[Problem]:
    """All problems of all mutants, without duplicates."""
    return list(dict.fromkeys(p for mutant in MUTANTS for p in mutant.problems()))


def try_mutants(path: Path, group: dist.ProcessGroup) -> list[Caught]:
    """Compare each mutant's results with the stored solutions of its problems."""
    loaded = torch.load(path, weights_only=True)
    solutions = dict(zip(mutant_problems(), loaded, strict=True))
    caught, size = [], dist.get_world_size(group)
    for mutant in (mutant for mutant in MUTANTS if size in mutant.ranks):
        margins = dict.fromkeys(DTYPES, 0.0)
        with mutant.applied():
            for problem in mutant.problems():
                found = judge(problem, Solution(**solutions[problem]), group)
                margins[problem.dtype] = max(margins[problem.dtype], found.margin)
        caught.append(Caught(mutant, size, margins))
    return caught


def _function(shipped: object) -> FunctionType:
    if isinstance(shipped, functools.cached_property):
        shipped = shipped.func
    found = getattr(shipped, "__func__", shipped)
    assert isinstance(found, FunctionType), f"{shipped} has no source"
    return found
