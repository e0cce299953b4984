"""The ranges that every size and constant of a model lies in, whatever mixer it belongs to."""

import dataclasses
from collections.abc import Mapping

MOST = 1 << 20
LONGEST = 1 << 24
LENGTHS = {"max_len", "window", "k", "chunk", "every", "refresh", "learned_positions"}
"""Counts of tokens, which may be larger than widths."""
MOST_LAYERS = 10_000
FROM_ZERO = {"iterations", "n_sink", "feature_seed", "window_shift"}
FREE = {"alpha_bias"}
"""Numbers of any sign."""


def check_ranges(config: object, path: str = "") -> None:
    """Check every number of a part of a model, and of the parts that it holds.

    Args:
        config: a frozen config class.
        path: its place, with a dot at its end, for messages.

    Raises:
        ValueError: names the key, its value and its range.
    """
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        check_range(f"{path}{field.name}", getattr(config, field.name))


def check_range(path: str, value: object) -> None:
    """Check one value, and those that it holds; the last word of its path says what it is.

    Raises:
        ValueError: names the key, its value and its range.
    """
    name = path.rpartition(".")[2].partition("[")[0]
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_ranges(each, f"{path}.{key}.")
    elif isinstance(value, tuple):
        for i, each in enumerate(value):
            check_range(f"{path}[{i}]", each)
    elif isinstance(value, int | float) and not isinstance(value, bool) and name not in FREE:
        low = 0 if name in FROM_ZERO else 1 if isinstance(value, int) else 1e-30
        high = LONGEST if name in LENGTHS else MOST_LAYERS if name == "n_layers" else MOST
        if isinstance(value, float):
            high = 1e30
        # A range may begin at 0, as dt_limit's.
        if not (low <= value <= high or (value == 0 and path.endswith("[0]"))):
            raise ValueError(f"{path} {value} is outside {low:g} to {high:g}; choose within it")
