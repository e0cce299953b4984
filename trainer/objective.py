"""Masking of a batch for its objective, and the loss, a chunk of tokens at a time."""

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


def total_nats(
    backbone: Backbone, hidden: Float[Tensor, "B L D"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Sum of the cross-entropy of all targets, in float32; targets of -100 count nothing."""
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    tokens = max(CHUNK_LOGITS // backbone.config.vocab_size, 1)
    if flat.shape[0] <= tokens:
        return _nats(backbone, flat, wanted)
    pieces = zip(flat.split(tokens), wanted.split(tokens), strict=True)
    nats = [checkpoint(_nats, backbone, h, t, use_reentrant=False) for h, t in pieces]
    return torch.stack(nats).sum()


def token_nats(
    backbone: Backbone, hidden: Float[Tensor, "B L D"], targets: Int[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """Cross-entropy of each target in float32; 0 where the target is -100."""
    logits = backbone.head(hidden).float()
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)


def _nats(backbone: Backbone, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = backbone.head(hidden).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
