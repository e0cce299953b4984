"""The optimizer of a run in a sweep: its batch, and its learning rate by the ladder's rule."""

import math
from collections.abc import Sequence

from sweeps.architecture import ArchitectureConfig
from sweeps.cells import Cell
from sweeps.config import LadderConfig, SweepConfig
from sweeps.tuning_rule import Place
from trainer.recipe import OptimizerConfig
from trainer.schema import ConfigError, load, merge


def optimizer_of(
    config: SweepConfig,
    architecture: ArchitectureConfig,
    cell: Cell,
    nominal: int,
    horizon: int | None = None,
) -> OptimizerConfig:
    """The optimizer of a cell of the sweep.

    Args:
        config: the sweep.
        architecture: the cell's.
        cell: names the architecture, and gives the factors on learning rate and batch.
        nominal: parameters of the cell's rung.
        horizon: the run's token budget, if it shares no trunk; None for the horizons of a trunk.

    Raises:
        ConfigError: neither ladder nor architecture has a rule for the learning rate.
    """
    batch = batch_of(config, cell)
    # Checked before a rule divides by it.
    placeholder = {"learning_rate": 1.0, "batch_tokens": batch}
    load(OptimizerConfig, merge(placeholder, config.optimizer), "optimizer")
    place = place_of(config.ladders[config.ladder], nominal, batch, horizon)
    given = {"batch_tokens": batch, **_rate(config, architecture, cell, place)}
    given["learning_rate"] *= cell["learning_rate_factor"]
    return load(OptimizerConfig, merge(given, config.optimizer), "optimizer")


def batch_of(config: SweepConfig, cell: Cell) -> int:
    """Tokens of a batch: the ladder's, by the cell's factor, unless the sweep sets it.

    Raises:
        ConfigError: the factor does not give whole sequences.
    """
    ladder = config.ladders[config.ladder]
    if "batch_tokens" in config.optimizer:
        return config.optimizer["batch_tokens"]
    batch = ladder.batch_tokens * cell["batch_factor"]
    if batch % ladder.seq_len:
        raise ConfigError(
            f"batch_tokens {ladder.batch_tokens} x the batch factor {cell['batch_factor']:g} is "
            f"{batch:g} tokens, not a whole number of sequences of {ladder.seq_len}; choose "
            "another factor or batch_tokens"
        )
    return int(batch)


def horizons_of(ladder: LadderConfig, nominal: int, batch: int) -> Sequence[int]:
    """The ladder's token budgets at a rung, in whole batches.

    Raises:
        ConfigError: two are the same number of batches.
    """
    budgets = ladder.horizons or tuple(r * nominal for r in ladder.tokens_per_parameter)
    rounded = [max(1, round(tokens / batch)) * batch for tokens in budgets]
    for tokens, budget in zip(rounded, budgets, strict=True):
        if rounded.count(tokens) > 1:
            raise ConfigError(
                f"the horizon {budget:.12g} and another are the same number of batches of {batch} "
                f"tokens, {tokens // batch}; leave one out"
            )
    return rounded


def place_of(ladder: LadderConfig, nominal: int, batch: int, horizon: int | None = None) -> Place:
    """Where a tuned rule is asked: horizons share a trunk and its rate, so at their mean log."""
    horizons = horizons_of(ladder, nominal, batch) if horizon is None else [horizon]
    return Place(nominal, math.exp(sum(map(math.log, horizons)) / len(horizons)), batch)


def _rate(
    config: SweepConfig, architecture: ArchitectureConfig, cell: Cell, place: Place
) -> dict[str, float]:
    """The learning rate and the architecture's factor on it, before the cell's factor."""
    ladder = config.ladders[config.ladder]
    if ladder.learning_rate is not None:
        return {
            "learning_rate": ladder.learning_rate.at(int(place.parameters)),
            "learning_rate_scale": architecture.learning_rate_scale,
        }
    if "learning_rate" in config.optimizer:
        return {"learning_rate": config.optimizer["learning_rate"]}
    if architecture.tuning is None:
        raise ConfigError(
            f"ladder {config.ladder} has no learning_rate, and architecture "
            f"{cell['architecture']} has no tuning rule; give "
            f"ladders.{config.ladder}.learning_rate, or optimizer.learning_rate"
        )
    return {"learning_rate": architecture.tuning.at(place)}
