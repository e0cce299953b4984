"""The named sizes of the ladder, from 10 k to 3 B parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.schema import ConfigError, suggest


@dataclass(frozen=True)
class Rung:
    """A named size: the Transformer's shape, and at nano sizes its parameters at 257 ids.

    Attributes:
        parameters: nominal size with a vocabulary of 257; None counts the published shape.
    """

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    parameters: int | None = None


RUNGS: Mapping[str, Rung] = {
    rung.name: rung
    for rung in (
        # Nano sizes are parameter counts that Transformer and Mamba both reach within 1 %.
        Rung("10k", 16, 2, 2, 9_780),
        Rung("20k", 24, 2, 2, 19_540),
        Rung("31k", 32, 2, 2, 31_330),
        Rung("68k", 48, 2, 2, 68_180),
        Rung("97k", 48, 3, 2, 97_460),
        Rung("160k", 64, 3, 4, 161_080),
        Rung("300k", 80, 4, 4, 301_000),
        Rung("460k", 96, 4, 4, 459_900),
        Rung("1M", 128, 5, 4, 1_022_760),
        Rung("125M", 768, 12, 12),
        Rung("360M", 1024, 24, 16),
        Rung("510M", 1280, 24, 20),
        Rung("760M", 1536, 24, 12),
        Rung("1B", 1792, 24, 14),
        Rung("1.3B", 2048, 24, 16),
        Rung("3B", 2560, 32, 20),
    )
}


def find_rung(name: str) -> Rung:
    """The rung of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RUNGS:
        raise ConfigError(f"unknown rung {name!r}; {suggest(name, list(RUNGS))}")
    return RUNGS[name]


def size_order(name: str) -> int:
    """The place of a rung among all, from the smallest; unknown ones come first."""
    return list(RUNGS).index(name) if name in RUNGS else -1
