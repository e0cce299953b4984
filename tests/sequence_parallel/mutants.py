"""Changes of one line in the shipped functions, each of which must not pass unseen.

The first four are those of a published patch, which one process that plays all ranks cannot find:
one round of states that no rank has corrected, outside autograd, and a first token that always goes
on with the document before it.
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
    """A line of a function that is put in another's place.

    Attributes:
        what: what goes wrong.
        module, path: where the function is.
        names: the mixers that are tried.
        scheme: how states go from rank to rank.
        ranks: numbers of ranks on which it is tried.
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
        """What the mutant is tried on."""
        return [
            Problem(name, layout, dtype, scheme=self.scheme)
            for name in self.names
            for layout in LAYOUTS
            for dtype in DTYPES
        ]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the changed function in place for a while.

        Raises:
            ValueError: the line does not stand in the function exactly once.
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
        "a neighbour's own state is taken for the true one",
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
        "a shard's first token always goes on with the document before it",
        SHARDED,
        "ShardedSequence.__init__",
        "self._row[:, begin - 1 : begin] if begin",
        "self._row[:, begin : begin + 1] if begin",
    ),
    Mutant(
        "ids are those of the whole row, not counted from the shard's first",
        SHARDED,
        "ShardedSequence.__init__",
        "PADDING, documents - before)",
        "PADDING, documents)",
    ),
    Mutant(
        "states do not decay on their way",
        PASSING,
        "Decay.factor",
        "torch.exp(log.conj() if backward else log)",
        "torch.exp(0 * log)",
    ),
    Mutant(
        "states go on into other documents",
        PASSING,
        "GatherPassing.run",
        "masked(decayed, self.keep[rank, rows])",
        "decayed",
    ),
    Mutant(
        "tokens of other documents hear the state",
        SHARDED,
        "ShardedSequence.recur",
        "self.documents == 0, 0",
        "self.documents >= 0, 0",
    ),
    Mutant(
        "the state's gradient is counted once for each rank",
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
        "gradients are collected from the near rank to the far one",
        PASSING,
        "Direction.opposite",
        "self.ahead[::-1], self.behind[::-1]",
        "self.ahead, self.behind",
    ),
    Mutant(
        "decays learn nothing from states that pass through",
        CARRY,
        "_Publish.backward",
        "return None, d_state, d_log.sum_to_size(sums.shape), None",
        "return None, d_state, 0 * d_log.sum_to_size(sums.shape), None",
    ),
    Mutant(
        "the rates of a Mamba learn nothing from states that pass through",
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
        "nothing comes before a shard's convolutions and windows",
        SHARDED,
        "ShardedSequence.halo",
        "return before.masked_fill(",
        "return (0 * before).masked_fill(",
        ("window", "mamba2"),
    ),
    Mutant(
        "what comes before a shard is one token off",
        EXCHANGE,
        "Spans.before",
        "(max(0, a - left), a)",
        "(max(0, a - left - 1), max(0, a - 1))",
        ("window", "mamba2"),
    ),
    Mutant(
        "gradients of what was sent do not come back",
        EXCHANGE,
        "_Exchange.backward",
        "list(d_incoming)",
        "[0 * x for x in d_incoming]",
        ("window", "attention", "scout", "monarch"),
    ),
    Mutant(
        "positions are one off behind the first rank",
        SHARDED,
        "ShardedSequence.positions",
        "self._all_positions()[:, self._begin : self._end]",
        "self._all_positions()[:, self._begin : self._end] + min(1, self._begin)",
        ("attention", "scout"),
    ),
    Mutant(
        "both ways of a Hydra run from the first rank to the last",
        SHARDED,
        "ShardedSequence.recur",
        "n_reversed = len(self.documents)",
        "n_reversed = 0",
        ("hydra noncausal_self",),
    ),
    Mutant(
        "a Hydra reads the state with its own row, not with that of the token after",
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
        "a ring hands on what a rank adds, not what came to it",
        PASSING,
        "RingPassing.end",
        "self.after(direction, total[direction.rows], added)",
        "added[direction.rows]",
        scheme=Scheme.RING,
    ),
    Mutant(
        "a ring hands on what came to a rank, not what its tokens make of it",
        PASSING,
        "RingPassing.end",
        "self.after(direction, total[direction.rows], added)",
        "total[direction.rows]",
        scheme=Scheme.RING,
    ),
    Mutant(
        "what is heard of far ranks does not decay over the near ones",
        PASSING,
        "DoublingPassing.receive",
        "self.decay.of(sums).applied(state, backward=self.backward)",
        "state",
        scheme=Scheme.DOUBLING,
    ),
    Mutant(
        "a rank tells of its own decay, not of that of all it tells of",
        PASSING,
        "DoublingPassing.round",
        "own + sums",
        "own",
        scheme=Scheme.DOUBLING,
        # On four ranks nobody hears of several ranks before more, so that no sum is read.
        ranks=(8,),
    ),
    Mutant(
        "documents that end at near ranks let states of far ones through",
        PASSING,
        "DoublingPassing.receive",
        "masked(passed_on, keep)",
        "passed_on",
        scheme=Scheme.DOUBLING,
    ),
)


@dataclass(frozen=True)
class Caught:
    """A mutant on so many ranks: the largest error over its tolerance, by dtype."""

    mutant: Mutant
    ranks: int
    margins: dict[str, float]


def mutant_problems() -> list[Problem]:
    """Every problem that a mutant is tried on, once."""
    return list(dict.fromkeys(p for mutant in MUTANTS for p in mutant.problems()))


def try_mutants(path: Path, group: dist.ProcessGroup) -> list[Caught]:
    """Judge the problems of each mutant with the mutant in place; solutions are written down."""
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
