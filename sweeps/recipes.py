"""The arms of a sweep that differ in how they are trained: recipes, which go over its own keys."""

from collections.abc import Iterator
from dataclasses import replace

from sweeps.cells import Cell
from sweeps.config import RecipeConfig, SweepConfig
from trainer.schema import ConfigError, merge, suggest

OWN = RecipeConfig()


def arms(config: SweepConfig) -> Iterator[tuple[str, str, RecipeConfig]]:
    """Every arm of a sweep: its name, its architecture and its recipe."""
    for architecture in config.architectures:
        for name in config.recipes or ("",):
            recipe = _recipe_of(config, name)
            yield _arm(architecture, name, recipe), architecture, recipe


def under_recipe(config: SweepConfig, cell: Cell) -> tuple[SweepConfig, Cell]:
    """The sweep as the runs of a cell see it, and the cell with the name of its arm.

    Raises:
        ConfigError: the sweep has no such recipe.
    """
    name = cell["recipe"]
    recipe = _recipe_of(config, name)
    seen = replace(
        config,
        optimizer=merge(config.optimizer, recipe.optimizer),
        schedule=merge(config.schedule, recipe.schedule),
        z_loss=config.z_loss if recipe.z_loss is None else recipe.z_loss,
    )
    factor = cell["learning_rate_factor"] * recipe.learning_rate_factor
    arm = _arm(cell["architecture"], name, recipe)
    return seen, {**cell, "learning_rate_factor": factor, "arm": arm}


def _arm(architecture: str, name: str, recipe: RecipeConfig) -> str:
    return architecture if recipe == OWN else f"{architecture} {name}"


def _recipe_of(config: SweepConfig, name: str) -> RecipeConfig:
    if not config.recipes and not name:
        return OWN
    if name not in config.recipes:
        raise ConfigError(f"unknown recipe {name!r}; {suggest(name, list(config.recipes))}")
    return config.recipes[name]
