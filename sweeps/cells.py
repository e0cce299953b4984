"""The cells of a sweep: the product of its axes, its replicates, and the entries of `also`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.config import SweepConfig, TuningProbes
from sweeps.rungs import size_order
from trainer.schema import ConfigError, load, suggest

AXES: Mapping[str, type] = {
    "architecture": str,
    "recipe": str,
    "corpus": str,
    "rung": str,
    "seed": int,
    "order_seed": int,
    "learning_rate_factor": float,
    "batch_factor": float,
    "horizon": int,
    "label": str,
    "execution": dict,
}
"""What an entry of `also` or `exclude` may set, and the type of one value."""

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Probe:
    """Factors on the learning rate and the batch of the run that a probe is compared with."""

    learning_rate_factor: float
    batch_factor: float


def cells(config: SweepConfig) -> Iterator[Cell]:
    """The product of the axes, the replicates, the further products of `also`, then the probes.

    Raises:
        ConfigError: an entry of `also` names no axis, or a value of another type.
    """
    ladder, corpora = config.ladders[config.ladder], config.corpora[config.corpus]
    axes = {
        "architecture": config.architectures,
        "recipe": tuple(config.recipes) or ("",),
        "corpus": (*corpora.default, *ladder.more_corpora),
        "rung": ladder.rungs,
        "seed": ladder.seeds,
        "order_seed": ladder.order_seeds or (None,),
        "learning_rate_factor": ladder.learning_rate_factors,
        "batch_factor": ladder.batch_factors,
    }
    products: list[Mapping[str, Sequence]] = [axes]
    if ladder.replicates:
        more = ladder.replicates
        seeds = {"seed": more.seeds, "order_seed": more.order_seeds or (None,)}
        products.append({**axes, "rung": more.rungs, **seeds})
    products += [{**axes, **rule} for rule in read_rules("also", config.also)]
    if ladder.tuning_probes:
        products += _probes(axes, ladder.tuning_probes)
    for product in products:
        for values in itertools.product(*product.values()):
            cell = dict(zip(product, values, strict=True))
            yield {**cell, "order_seed": _order_seed(cell)}


def is_probe(cell: Cell) -> bool:
    """Whether a cell is one of the runs that check the study's tuning."""
    return cell.get("probe") is not None


def _probes(axes: Mapping[str, Sequence], probes: TuningProbes) -> Iterator[Mapping[str, Sequence]]:
    """Each factor by itself, on the first corpus and the first seeds."""
    first = {name: axes[name][:1] for name in ("corpus", "seed", "order_seed")}
    factors = [Probe(factor, 1.0) for factor in probes.learning_rate_factors]
    factors += [Probe(1.0, factor) for factor in probes.batch_factors]
    for probe in factors:
        yield {
            **axes,
            **first,
            "rung": probes.rungs_of(sorted(axes["rung"], key=size_order)),
            "learning_rate_factor": [probe.learning_rate_factor],
            "batch_factor": [probe.batch_factor],
            "probe": [probe],
        }


def _order_seed(cell: Cell) -> int:
    """The seed of the order of samples: runs that share it share their samples."""
    return cell["seed"] if cell["order_seed"] is None else cell["order_seed"]


def read_rules(key: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, list]]:
    """The entries of `also` or `exclude`, each value as a list of typed values.

    Raises:
        ConfigError: an entry is empty, names no axis, or holds a value of another type.
    """
    rules = []
    for i, entry in enumerate(entries):
        rule = {}
        for axis, value in entry.items():
            if axis not in AXES:
                raise ConfigError(f"unknown axis {axis!r}; {suggest(str(axis), list(AXES))}")
            given = value if isinstance(value, list) else [value]
            path = f"{key}[{i}].{axis}"
            rule[axis] = [load(AXES[axis], each, path) for each in given]
            if not given:
                raise ConfigError(f"{path} is an empty list; give a value or remove it")
        if not rule:
            raise ConfigError(f"{key}[{i}] is empty; give an axis, such as rung, or remove it")
        rules.append(rule)
    return rules


def matches(cell: Cell, rule: Mapping[str, Sequence]) -> bool:
    """Whether a cell has one of a rule's values on each of its axes."""
    return all(cell.get(axis) in values for axis, values in rule.items())
