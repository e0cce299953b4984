"""The learning rate at each step, and what happens after which step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of a step, counted from 0: linear warm-up, constant if at all, decay."""
    options, schedule = config.optimizer, config.schedule
    rate = options.peak * min((step + 1) / _warmup_steps(config), 1.0)
    decay = config.steps - decay_begins(config)
    if decay:
        left = min((config.steps - step) / (decay + 1), 1.0)
        shape = schedule.decay_shape if schedule.kind == "wsd" else schedule.kind
        rate *= schedule.final_share + (1 - schedule.final_share) * SHAPES[shape](left)
    return rate


SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "sqrt": lambda left: 1 - math.sqrt(1 - left),
}
"""The share of the way from the final rate to the peak, by the share of the decay that is left."""


def decay_begins(config: RunConfig) -> int:
    """The first step of the decay; the number of steps if there is none."""
    if config.schedule.kind != "wsd":
        return _warmup_steps(config)
    return config.steps - round(config.schedule.decay_fraction * config.steps)


def _warmup_steps(config: RunConfig) -> int:
    return max(config.schedule.warmup_tokens // config.optimizer.batch_tokens, 1)


@dataclass(frozen=True)
class Events:
    """What happens when `step` steps are done.

    Attributes:
        save: whether a checkpoint is published.
        pin: whether that checkpoint is kept for branches.
        required: whether branches or the finished run need it.
        evaluate: whether all sets are evaluated.
    """

    save: bool
    pin: bool
    required: bool
    evaluate: bool


@dataclass(frozen=True)
class Milestones:
    """When a run saves and evaluates, in steps done.

    Attributes:
        last: steps of the run.
        forks: steps whose checkpoints other horizons start from.
        milestones: steps after which all sets are evaluated.
        save_every: steps between checkpoints, or None.
    """

    last: int
    forks: frozenset[int]
    milestones: frozenset[int]
    save_every: int | None

    def events(self, step: int) -> Events:
        """What happens when `step` steps are done."""
        evaluate = step in self.milestones
        periodic = self.save_every is not None and step % self.save_every == 0
        pin = step in self.forks
        required = pin or step == self.last
        return Events(save=required or periodic, pin=pin, required=required, evaluate=evaluate)


def run_milestones(
    config: RunConfig,
    execution: ExecutionConfig,
    evaluation: EvaluationConfig,
    forks: frozenset[int] = frozenset(),
) -> Milestones:
    """When a run saves and evaluates.

    Args:
        config: the run.
        execution: how often it saves.
        evaluation: where all runs of the study are evaluated; a run's end is added.
        forks: for a trunk, the steps at which its horizons begin to decay.
    """
    batch = config.optimizer.batch_tokens
    milestones = {tokens // batch for tokens in evaluation.milestones}
    ends = set() if forks else {config.steps}
    save_every = execution.save_every_tokens
    return Milestones(
        last=config.steps,
        forks=forks,
        milestones=frozenset({m for m in milestones if 0 < m <= config.steps} | ends),
        save_every=None if save_every is None else max(save_every // batch, 1),
    )
