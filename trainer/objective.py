"""Masking of a batch for its objective, and the loss, a chunk of tokens at a time."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_pipelines.batch import IGNORED, Batch
from data_pipelines.masking import infill_spans, mask_tokens
from models.backbone import Backbone
from trainer.config import RunConfig

CHUNK_LOGITS = 16_000_000
"""Logits held at once; at most 64 MB in float32."""


HIDERS = {"masked_lm": mask_tokens, "seq2seq": infill_spans}


def prepare(batch: Batch, config: RunConfig, seed: int, rate: float) -> Batch:
    """The batch as the run's objective wants it: next tokens, hidden tokens, or hidden spans.

    Args:
        batch: sequences with their next tokens.
        config: the run.
        seed: of what is hidden.
        rate: share of the tokens that is hidden; not read by next-token prediction.
    """
    if config.objective == "causal_lm":
        return batch
    return HIDERS[config.objective](batch, seed, rate, config.model.vocab_size - 1)


class Losses(NamedTuple):
    """Sums over all targets.

    Attributes:
        nats: the cross-entropy, which is what records call the loss.
        minimised: what gradients are of: nats, and the z-loss if there is one.
    """

    nats: Float[Tensor, ""]
    minimised: Float[Tensor, ""]


def total_losses(
    backbone: Backbone,
    hidden: Float[Tensor, "B L D"],
    targets: Int[Tensor, "B L"],
    z_loss: float,
) -> Losses:
    """Sum the losses of all targets, in float32; targets of -100 count nothing.

    Args:
        backbone: whose head gives the logits.
        hidden: of each token.
        targets: of each token.
        z_loss: weight of log^2 Z, the squared log of the softmax's denominator.
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    tokens = max(CHUNK_LOGITS // backbone.config.vocab_size, 1)
    if flat.shape[0] <= tokens:
        return _losses(backbone, flat, wanted, z_loss)
    pieces = zip(flat.split(tokens), wanted.split(tokens), strict=True)
    parts = [checkpoint(_losses, backbone, h, t, z_loss, use_reentrant=False) for h, t in pieces]
    return Losses(*(torch.stack(each).sum() for each in zip(*parts, strict=True)))


def total_nats(
    backbone: Backbone, hidden: Float[Tensor, "B L D"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of all targets, in float32; targets of -100 count nothing."""
    return total_losses(backbone, hidden, targets, 0.0).nats


def token_nats(
    backbone: Backbone, hidden: Float[Tensor, "B L D"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """Cross-entropy of each target in float32; 0 where the target is -100."""
    logits = backbone.head(hidden).float()
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)


def _losses(backbone: Backbone, hidden: Tensor, targets: Tensor, z_loss: float) -> Losses:
    logits = backbone.head(hidden).float()
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return Losses(nats, nats)
    squares = logits.logsumexp(dim=-1).square().masked_fill(targets == IGNORED, 0.0)
    return Losses(nats, nats + z_loss * squares.sum())
