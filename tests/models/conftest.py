"""Small mixers of every kind, and packed inputs for them."""

import dataclasses

import pytest
import torch

from models.mixer import Mixer, mixer_kinds
from models.sequence import WholeSequence

D_MODEL = 16
REQUIRED = {"attention": {"n_heads": 2, "initial_std": 0.3}}


def build(kind: str, seed: int = 0) -> Mixer:
    """A mixer of a kind with weights of ordinary size, all of them drawn anew."""
    config = mixer_kinds()[kind](**REQUIRED.get(kind, {}))
    mixer = config.build(D_MODEL, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in mixer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(module.draw(name, generator))
                if name == "weight" and parameter.ndim == 1:
                    parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return mixer


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


def required_fields(kind: str) -> list[str]:
    """Fields without a default, which a test must give."""
    fields = dataclasses.fields(mixer_kinds()[kind])
    return [f.name for f in fields if f.default is dataclasses.MISSING]
