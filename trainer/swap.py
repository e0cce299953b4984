"""Evaluate a trained model with other mixers in place of its own, without training.

The weights load strictly, so a swap is between mixers of the very same parameters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipelines.batch import Batch
from models.backbone import Backbone, BackboneConfig
from models.mixer import mixer_kinds
from models.mixers.softmax.hip import Hip
from models.sequences.whole import WholeSequence
from trainer.objective import token_nats
from trainer.schema import ConfigError, dump, load, suggest


class Measured(NamedTuple):
    """The loss of each target, 0 where there is none, and what searches of keys found.

    Attributes:
        recall: share of each query's best keys that its search found, as many keys as it keeps,
            averaged over layers and heads; None where no mixer searches.
    """

    nats: Float[Tensor, "B L"]
    recall: Float[Tensor, "B L"] | None


def swapped(model: BackboneConfig, swap: Mapping[str, Mapping[str, object]]) -> BackboneConfig:
    """The model with mixers of some kinds replaced; fields that are not given are kept.

    Args:
        model: the trained architecture.
        swap: by the kind that goes, what comes, such as {"attention": {"kind": "hip", "k": 64}}.

    Raises:
        ConfigError: a kind is unknown or is not in the model, or what comes has no such field.
    """
    plain = dump(model)
    for old, new in swap.items():
        known = mixer_kinds()
        for kind in (old, str(new.get("kind", old))):
            if kind not in known:
                raise ConfigError(f"unknown mixer kind {kind!r}; {suggest(kind, list(known))}")
        there = _kinds(plain["blocks"])
        if old not in there:
            raise ConfigError(
                f"the swap replaces {old}, but the model's mixers are "
                f"{', '.join(sorted(there))}; choose one of these"
            )
        plain["blocks"] = _replaced(plain["blocks"], old, new)
    return load(BackboneConfig, plain, "model")


@torch.no_grad()
def measure(backbone: Backbone, batch: Batch) -> Measured:
    """Evaluate a batch; a layer's searches are judged on the inputs it gets under the swap."""
    found: list[Tensor] = []

    def judge(mixer: nn.Module, inputs: tuple) -> None:
        assert isinstance(mixer, Hip)
        found.append(mixer.recall(*inputs[:2]).mean(dim=1))

    searching = [module for module in backbone.modules() if isinstance(module, Hip)]
    hooks = [module.register_forward_pre_hook(judge) for module in searching]
    try:
        hidden = backbone(batch.tokens, WholeSequence(batch.documents))
    finally:
        for hook in hooks:
            hook.remove()
    nats = token_nats(backbone, hidden, batch.targets)
    return Measured(nats, torch.stack(found).mean(dim=0) if found else None)


def _kinds(blocks: Mapping[str, Any]) -> set[str]:
    return {block["mixer"]["kind"] for block in blocks.values()}


def _replaced(
    blocks: Mapping[str, Any], old: str, new: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    return {
        name: {**block, "mixer": {**block["mixer"], **new}}
        if block["mixer"]["kind"] == old
        else dict(block)
        for name, block in blocks.items()
    }
