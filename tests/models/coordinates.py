"""A coordinate check: how much activations change in the first steps, at several widths.

After Yang et al. 2022, appendix D.1. Under a parametrisation in which the best learning rate does
not move with the width, every activation changes by an amount that does not depend on the width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from models.backbone import Backbone, BackboneConfig, build_backbone
from models.mup import MupConfig
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import Rung
from sweeps.sizing import Shape, published_backbone
from tests.trainer.conftest import PLAIN
from trainer.config import RunConfig
from trainer.objective import total_nats
from trainer.optimizer import build_optimizer
from trainer.schema import load

WIDTHS = (32, 64, 128, 256)
HEADS, DEPTH = 2, 2
ROWS, LENGTH, VOCAB = 4, 64, 257
STEPS = 4
RATE = 0.01
MUP = MupConfig(base_width=WIDTHS[0], base_head_dim=WIDTHS[0] // HEADS)


def model_at(
    name: str, width: int, mup: MupConfig | None, *, depth: int = DEPTH, length: int = LENGTH
) -> BackboneConfig:
    """A named architecture at a width, with as many heads as at any other."""
    architecture = read_architectures()[name]
    masked = architecture.model.get("form") == "encoder"
    place = Shape(Rung(f"width {width}", width, depth, HEADS), VOCAB + masked, length)
    if mup is not None:
        base = {"base_width": mup.base_width, "base_head_dim": mup.base_head_dim}
        architecture = replace(architecture, model={**architecture.model, "mup": base})
    return published_backbone(architecture, place)


def run_of(config: BackboneConfig) -> RunConfig:
    """A small run of a model."""
    objective = "causal_lm" if config.form == "decoder" else "masked_lm"
    return replace(load(RunConfig, PLAIN), model=config, objective=objective)


def changes(config: BackboneConfig, seed: int, rate: float = RATE) -> dict[str, list[float]]:
    """The root mean square of each activation's change since the start, after each step."""
    backbone = build_backbone(config, seed)
    tokens = _tokens(seed)
    optimizer = build_optimizer(backbone, run_of(config))
    before = _activations(backbone, tokens)
    sizes: dict[str, list[float]] = {place: [] for place in before}
    for _ in range(STEPS):
        targets = tokens.roll(-1, dims=1)
        loss = total_nats(backbone, backbone(tokens, _whole()), targets) / tokens.numel()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_multiplier"]
        optimizer.step()
        for place, after in _activations(backbone, tokens).items():
            sizes[place].append(float((after - before[place]).square().mean().sqrt()))
    return sizes


def changes_by_width(
    name: str, mup: MupConfig | None, seeds: Sequence[int], widths: Sequence[int] = WIDTHS
) -> dict[str, np.ndarray]:
    """Geometric means over seeds of the changes at each place: a row for each width, by step."""
    found: dict[str, list[list[list[float]]]] = {}
    for width in widths:
        each = [changes(model_at(name, width, mup), seed) for seed in seeds]
        for place in each[0]:
            found.setdefault(place, []).append([one[place] for one in each])
    return {place: np.exp(np.log(np.array(rows)).mean(1)) for place, rows in found.items()}


def slopes(changed: Mapping[str, np.ndarray], widths: Sequence[int] = WIDTHS) -> dict[str, float]:
    """The exponent of the width in the change after the last step, by place."""
    logs = [math.log(width) for width in widths]
    return {
        place: float(np.polyfit(logs, np.log(rows[:, -1]), 1)[0]) for place, rows in changed.items()
    }


def _activations(backbone: Backbone, tokens: Tensor) -> dict[str, Tensor]:
    """What every mixer and channel mixer adds to the residual stream, and the logits."""
    found: dict[str, Tensor] = {}
    hooks = []
    for i, layer in enumerate(backbone.layers):
        for part in ("mixer", "channel"):
            module = getattr(layer, part)
            if module is not None:
                hooks.append(module.register_forward_hook(_keep(found, f"{part} {i}")))
    with torch.no_grad():
        found["logits"] = backbone.head(backbone(tokens, _whole()))
    for hook in hooks:
        hook.remove()
    return found


def _keep(found: dict[str, Tensor], place: str):
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        del module, inputs
        found[place] = output.detach().clone()

    return hook


def _tokens(seed: int) -> Tensor:
    """Tokens of a skewed distribution, so that there is something to learn at once."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(ROWS, LENGTH, generator=draw).pow(2) * VOCAB).long()


def _whole() -> WholeSequence:
    return WholeSequence(torch.zeros(ROWS, LENGTH, dtype=torch.int32))
