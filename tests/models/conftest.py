"""Small mixers of every kind, and packed inputs for them."""

import dataclasses

import torch

from models.mixer import Mixer, MixerConfig, Pattern, Slot, mixer_class, mixer_kinds
from models.mixers.softmax.attention import AttentionConfig
from models.parts.layers import Drawn
from models.parts.monarch_matrix import monarch_multiply
from models.sequences.whole import WholeSequence

D_MODEL = 16
SMALL = {
    "n_heads": 2,
    "initial_std": 0.3,
    "max_len": 64,
    "window": 5,
    "every": 4,
    "chunk": 4,
    "filter_hidden": 16,
    "k": 8,
    "head_dim": 8,
    "mixers": {
        "a": AttentionConfig(n_heads=2, initial_std=0.3),
        "b": AttentionConfig(n_heads=4, n_kv_heads=2, initial_std=0.3),
    },
}
"""Sizes for tests, given to every mixer whose configuration has a field of that name."""


def build(kind: str, seed: int = 0, pattern: Pattern | None = None, **fields: object) -> Mixer:
    """A mixer of a kind with weights of ordinary size, all of them drawn anew.

    Its pattern is the one given, else causal self attention's where it serves that, else
    non-causal self's, else the first it serves. `fields` go over the sizes of SMALL.
    """
    slot = Slot(D_MODEL, 2, pattern or first_pattern(kind))
    return drawn(small_config(kind, **fields).build(slot), seed)


def small_config(kind: str, **fields: object) -> MixerConfig:
    """The configuration of a kind at the sizes of SMALL, which `fields` go over."""
    config_class = mixer_kinds()[kind]
    known = {f.name for f in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SMALL.items() if name in known}
    return config_class(**{**sizes, **fields})


def drawn(mixer: Mixer, seed: int) -> Mixer:
    """The mixer with initial values, and norms that are not all ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in mixer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                assert isinstance(module, Drawn), f"{module} does not say how {name} starts"
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


def monarch_entries(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The Monarch matrix of two factors, written out."""
    units = torch.eye(first.shape[0] * first.shape[2], dtype=first.dtype)
    return monarch_multiply(units, first, second).t()
