"""AdamW with its parameter groups."""

import torch

from models.backbone import Backbone, undecayed
from trainer.config import RunConfig


def adamw(
    backbone: Backbone, config: RunConfig, kind: type[torch.optim.AdamW]
) -> torch.optim.AdamW:
    """AdamW with two groups: decayed, and undecayed (vectors, and what a mixer marks)."""
    names = undecayed(backbone)
    decayed = [p for name, p in backbone.named_parameters() if name not in names]
    rest = [p for name, p in backbone.named_parameters() if name in names]
    options = config.optimizer
    return kind(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )
