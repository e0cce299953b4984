"""Masking for the masked objectives, a function of (seed, sample id, position) alone.

The draws are hashes, so a sequence is masked in the same way wherever and by however many ranks it
is read.
"""

import numpy as np
import torch

from data_pipelines.batch import IGNORED, PADDING, Batch, mix

KEPT_SHARE = 0.1
RANDOM_SHARE = 0.1
"""Shares of the chosen tokens that stay as they are, and that another token replaces (Devlin et al.
2019, section 3.1); the others become the mask."""


def mask_tokens(batch: Batch, seed: int, rate: float, mask_id: int) -> Batch:
    """Hide a share of the tokens; the targets are what stood there, `IGNORED` elsewhere.

    Args:
        batch: sequences; their targets are not read.
        seed: of the run, or of the evaluation.
        rate: chance of a token to be chosen.
        mask_id: id of the mask, above the tokenizer's.
    """
    tokens = batch.tokens.numpy()
    chosen = _draw(batch, seed, 0) < rate
    how, other = _draw(batch, seed, 1), _draw(batch, seed, 2)
    replaced = np.where(how < RANDOM_SHARE, (other * mask_id).astype(np.int64), mask_id)
    replaced = np.where(how >= 1 - KEPT_SHARE, tokens, replaced)
    return Batch(
        torch.from_numpy(np.where(chosen, replaced, tokens)),
        torch.from_numpy(np.where(chosen, tokens, IGNORED)),
        batch.documents,
        batch.samples,
    )


def infill_spans(batch: Batch, seed: int, rate: float, mask_id: int) -> Batch:
    """Cut a span out of each sequence: the rest is the source, the span is what is to be written.

    The span begins at a drawn place and covers the share `rate` of the sequence, or less where its
    document ends before. In the source a single mask stands for it. The target side starts with a
    mask too, then has the span, each token predicting the next. Both sides are filled up with
    padding to a fixed length.

    Args:
        batch: sequences; their targets are not read.
        seed: of the run, or of the evaluation.
        rate: share of a sequence that the span covers at most.
        mask_id: id of the mask, above the tokenizer's.
    """
    B, L = batch.tokens.shape
    longest = max(1, round(rate * L))
    begins = (_draw(batch, seed, 0)[:, 0] * (L - longest + 1)).astype(np.int64)
    tokens, documents = batch.tokens.numpy(), batch.documents.numpy()
    source = np.full((B, L), mask_id, dtype=np.int64)
    source_documents = np.full((B, L), PADDING, dtype=np.int32)
    written = np.full((B, longest), mask_id, dtype=np.int64)
    targets = np.full((B, longest), IGNORED, dtype=np.int64)
    written_documents = np.full((B, longest), PADDING, dtype=np.int32)
    for row, begin in enumerate(begins):
        within = documents[row, begin : begin + longest] == documents[row, begin]
        end = begin + int(within.sum())
        rest = np.concatenate([tokens[row, :begin], [mask_id], tokens[row, end:]])
        theirs = np.delete(documents[row], np.arange(begin + 1, end))
        source[row, : len(rest)], source_documents[row, : len(rest)] = rest, theirs
        span = tokens[row, begin:end]
        written[row, 1 : len(span)], targets[row, : len(span)] = span[:-1], span
        written_documents[row, : len(span)] = documents[row, begin]
    return Batch(
        torch.from_numpy(written),
        torch.from_numpy(targets),
        torch.from_numpy(written_documents),
        batch.samples,
        torch.from_numpy(source),
        torch.from_numpy(source_documents),
    )


def _draw(batch: Batch, seed: int, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for each place of each sequence."""
    B, L = batch.tokens.shape
    keys = mix(mix(batch.samples, seed), stream)
    places = np.tile(np.arange(L), B)
    return (mix(np.repeat(keys, L), places) >> np.uint64(11)).reshape(B, L) * 2.0**-53
