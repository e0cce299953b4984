"""Small mixers of every kind, and packed inputs for them."""

import dataclasses

import pytest
import torch

from models.mixer import Mixer, Pattern, Slot, mixer_class, mixer_kinds
from models.sequence import WholeSequence

D_MODEL = 16
SMALL = {
    "n_heads": 2,
    "initial_std": 0.3,
    "max_len": 64,
    "window": 5,
    "every": 4,
}
"""Sizes for tests, given to every mixer whose configuration has a field of that name."""


def build(kind: str, seed: int = 0, pattern: Pattern | None = None, **fields: object) -> Mixer:
    """A mixer of a kind with weights of ordinary size, all of them drawn anew.

    Its pattern is the one given, else causal self attention's where it serves that, else
    non-causal self's, else the first it serves. `fields` go over the sizes of SMALL.
    """
    config_class = mixer_kinds()[kind]
    known = {f.name for f in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SMALL.items() if name in known}
    config = config_class(**{**sizes, **fields})
    mixer = config.build(Slot(D_MODEL, 2, pattern or first_pattern(kind)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in mixer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(module.draw(name, generator))
                if name == "weight" and parameter.ndim == 1:
                    parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return mixer


def first_pattern(kind: str) -> Pattern:
    """The pattern that a mixer is tested in where nothing else is asked for."""
    served = mixer_class(kind).patterns
    order = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, *sorted(served, key=lambda p: p.value))
    return next(pattern for pattern in order if pattern in served)


def inputs(length: int, seed: int = 1, rows: int = 2) -> torch.Tensor:
    """Random features (rows, length, D_MODEL)."""
    return torch.randn(rows, length, D_MODEL, generator=torch.Generator().manual_seed(seed))


def packed(lengths: tuple[int, ...], rows: int = 2) -> torch.Tensor:
    """Document ids of rows that hold documents of these lengths."""
    ids = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])
    return ids.expand(rows, -1).contiguous()


def whole(length: int, rows: int = 2) -> WholeSequence:
    """A sequence of one document a row."""
    return WholeSequence(torch.zeros(rows, length, dtype=torch.int32))


@pytest.fixture(params=sorted(mixer_kinds()))
def kind(request: pytest.FixtureRequest) -> str:
    """Every registered mixer."""
    return request.param
