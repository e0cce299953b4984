"""Maximal-update parametrisation, muP: what changes with the width so that the rate need not.

After Yang et al. 2022 (2203.03466, table 8, for Adam). At `base_width` a model equals the
standard one bit for bit. With m = d_model / base_width, and k = head_dim / base_head_dim:

| parameters | initial std | learning rate |
|---|---|---|
| dense maps between embedding and head, Monarch MLPs | 1 / sqrt(fan in) | 1 / m |
| maps within heads: gates of RG-LRU and minGRU | 1 / sqrt(fan in) | 1 / k |
| Mamba's dt_proj, whose fan in is ceil(d_model / 16) | 1 / sqrt(fan in) | 1 / m |
| the same with a dt_rank of its own | 1 / sqrt(fan in) | 1 |
| embedding, head, learned positions | constant | 1 |
| norms, biases, A_log, D, dt_bias, Lambda, skips and other vectors | constant | 1 |
| short convolutions, whose fan in is their taps | constant | 1 |
| filter networks of M2, also their last map: fan in is filter_hidden | constant | 1 |
| matrices over positions, of structured mixers: fan in is a length | constant | 1 |

Logits are divided by m, with tied embeddings too: the embedding keeps the scale and rate that an
input needs, and the division makes it the output of table 8, whose std and rate are constant as
well. Attention scores are divided by sqrt(k), 1/head_dim in place of 1/sqrt(head_dim). That holds
with normalised queries and keys, too: norms bound a product by head_dim times the gains, and
training aligns the two, so that it grows to that order. Weight decay is divided by the rate's
multiplier, as in the authors' package: rate times decay stays.

State sizes, taps and filter networks are to be the same at all widths: with a growing d_state, an
S6 layer has another limit, which these rules do not cover (Vankadara et al. 2024).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from torch import nn


@dataclass(frozen=True)
class MupConfig:
    """Where the parametrisation equals the standard one.

    Attributes:
        base_width: the d_model that learning rate and initial_std are meant for.
        base_head_dim: width of its heads; None where heads have the same width at all d_model.
    """

    base_width: int
    base_head_dim: int | None = None

    def width_share(self, d_model: int) -> float:
        """1 / m of the table."""
        return self.base_width / d_model

    def head_share(self, head_dim: int | float) -> float:
        """1 / k of the table."""
        return 1.0 if self.base_head_dim is None else self.base_head_dim / head_dim


class FanIn(Enum):
    """What the number of inputs of each output of a parameter grows with.

    Modules state it as `fan_in`, by their parameters' names; what they leave out does not grow.
    """

    WIDTH = "d_model"
    HEAD = "head_dim"


def rate_multipliers(model: nn.Module, mup: MupConfig | None, d_model: int) -> dict[str, float]:
    """The factor on the learning rate of every parameter, by name."""
    shares = {name: 1.0 for name, _ in model.named_parameters()}
    if mup is None:
        return shares
    for path, module in model.named_modules():
        fans: Mapping[str, FanIn] = getattr(module, "fan_in", {})
        for name, fan_in in fans.items():
            if fan_in is FanIn.WIDTH:
                share = mup.width_share(d_model)
            else:
                # Of a block-diagonal map with a block for each head.
                share = mup.head_share(d_model / len(getattr(module, name)))
            shares[f"{path}.{name}"] = share
    return shares


Part = TypeVar("Part")


def at_width(part: Part, mup: MupConfig | None, d_model: int) -> Part:
    """The config of a mixer or channel mixer with its `initial_std` scaled to a width."""
    if mup is None:
        return part
    assert dataclasses.is_dataclass(part)
    assert not isinstance(part, type)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name == "initial_std" and value is not None:
            changes[field.name] = value * mup.width_share(d_model) ** 0.5
        elif isinstance(value, Mapping):
            changes[field.name] = {k: at_width(each, mup, d_model) for k, each in value.items()}
    return dataclasses.replace(part, **changes)
