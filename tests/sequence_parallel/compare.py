"""A problem on ranks, held against its solution on one process."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from models.sequences.sharded import ShardedSequence
from tests.sequence_parallel.problem import (
    DTYPES,
    LAYOUTS,
    Problem,
    Solution,
    solve,
    solve_whole,
)

TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-4)}
"""Of outputs, then of gradients; for the relative root mean square and the largest error alike."""
FLOOR = 1e-3
"""Gradients of parameters that are smaller than this share of the largest are held to that."""


@dataclass(frozen=True)
class Verdict:
    """The worst relative errors of a problem on so many ranks.

    Attributes:
        parameter: name and error of the worst parameter gradient.
    """

    problem: Problem
    ranks: int
    outputs: float
    inputs: float
    parameter: tuple[str, float]
    norm: float

    @property
    def gradients(self) -> float:
        """The worst of all gradients."""
        return max(self.inputs, self.parameter[1], self.norm)

    @property
    def margin(self) -> float:
        """The largest error over its tolerance: below 1 where everything is in order."""
        outputs, gradients = TOLERANCES[self.problem.dtype]
        worst = max(self.outputs / outputs, self.gradients / gradients)
        return worst if math.isfinite(worst) else math.inf


def save_solutions(problems: list[Problem], path: Path) -> None:
    """Solve problems on one process and write the solutions down, each once."""
    solved: dict[Problem, dict[str, object]] = {}
    for problem in problems:
        if problem.whole not in solved:
            solved[problem.whole] = dataclasses.asdict(solve_whole(problem))
    torch.save([solved[problem.whole] for problem in problems], path)


def judge_all(problems: list[Problem], path: Path, group: dist.ProcessGroup) -> list[Verdict]:
    """Judge problems whose solutions were written down."""
    solutions = torch.load(path, weights_only=True)
    return [
        judge(problem, Solution(**solution), group)
        for problem, solution in zip(problems, solutions, strict=True)
    ]


def judge(problem: Problem, expected: Solution, group: dist.ProcessGroup) -> Verdict:
    """Solve a problem on the ranks of a group, each of which has a shard of it."""
    ranks, dtype = dist.get_world_size(group), DTYPES[problem.dtype]
    layout = LAYOUTS[problem.layout]
    lengths = layout.lengths(ranks)
    begin = sum(lengths[: dist.get_rank(group)])
    mine = slice(begin, begin + lengths[dist.get_rank(group)])
    x, weights = problem.inputs()
    sequence = ShardedSequence(layout.documents()[:, mine], group, problem.scheme)
    found = solve(problem.build(), x[:, mine], weights[:, mine], sequence, dtype)
    real = weights[:, mine] > 0
    outputs = _error(found.outputs[real], expected.outputs[:, mine][real], group)
    inputs = 0.0
    if found.d_inputs is not None and expected.d_inputs is not None:
        inputs = _error(found.d_inputs, expected.d_inputs[:, mine], group)
    summed = _summed(found.d_parameters, group)
    norm = abs(_norm(summed) / _norm(expected.d_parameters) - 1)
    return Verdict(problem, ranks, outputs, inputs, _worst(summed, expected.d_parameters), norm)


def _error(found: Tensor, expected: Tensor, group: dist.ProcessGroup) -> float:
    """The larger of relative root mean square and relative largest error, over all ranks."""
    off, wide = (found.double() - expected.double()), expected.double()
    sums = torch.stack([off.square().sum(), wide.square().sum()])
    largest = torch.stack([_largest(off), _largest(wide)])
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return float(max((sums[0] / sums[1]).sqrt().item(), (largest[0] / largest[1]).item()))


def _largest(x: Tensor) -> Tensor:
    # A NaN must stay one.
    return x.abs().max() if x.numel() else x.new_zeros(())


def _summed(gradients: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    flat = torch.cat([x.double().flatten() for x in gradients.values()])
    dist.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in gradients.values()])
    return {
        name: part.view(x.shape) for (name, x), part in zip(gradients.items(), parts, strict=True)
    }


def _worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    errors = {}
    for measure in (Tensor.norm, _largest):
        floor = FLOOR * max(measure(x.double()).item() for x in expected.values())
        for name, x in expected.items():
            off = measure(found[name] - x.double()).item()
            error = off / max(measure(x.double()).item(), floor)
            errors[name] = max(errors.get(name, 0.0), error if math.isfinite(error) else math.inf)
    name = max(errors, key=lambda name: errors[name])
    return name, errors[name]


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in gradients.values()))
