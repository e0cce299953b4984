"""What the masked objectives hide: shares, determinism, and nothing lost."""

import numpy as np
import pytest
import torch

from data_pipelines.batch import IGNORED, PADDING, Batch
from data_pipelines.masking import infill_spans, mask_tokens

MASK = 257


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (96, 128), generator=generator)
    documents = torch.zeros(96, 128, dtype=torch.int32)
    documents[:, 70:] = 1
    return Batch(tokens, tokens.roll(-1, 1), documents, np.arange(96))


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_the_share_that_is_hidden_is_the_one_asked_for(batch: Batch, rate: float) -> None:
    masked = mask_tokens(batch, 1, rate, MASK)
    chosen = masked.targets != IGNORED
    count = chosen.numel()
    assert abs(int(chosen.sum()) - rate * count) < 4 * (rate * (1 - rate) * count) ** 0.5
    become_mask = (masked.tokens[chosen] == MASK).double().mean().item()
    stay = (masked.tokens[chosen] == batch.tokens[chosen]).double().mean().item()
    assert become_mask == pytest.approx(0.8, abs=0.04)
    assert stay == pytest.approx(0.1, abs=0.03)


def test_targets_are_what_stood_there_and_nothing_else_changes(batch: Batch) -> None:
    masked = mask_tokens(batch, 1, 0.3, MASK)
    chosen = masked.targets != IGNORED
    assert torch.equal(masked.targets[chosen], batch.tokens[chosen])
    assert torch.equal(masked.tokens[~chosen], batch.tokens[~chosen])


def test_a_sequence_is_hidden_alike_in_any_batch(batch: Batch) -> None:
    whole = mask_tokens(batch, 1, 0.3, MASK)
    parts = [mask_tokens(part, 1, 0.3, MASK) for part in batch.split(7)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert not torch.equal(mask_tokens(batch, 2, 0.3, MASK).tokens, whole.tokens)


def test_source_and_span_together_are_the_sequence(batch: Batch) -> None:
    filled = infill_spans(batch, 1, 0.3, MASK)
    assert filled.source is not None
    assert filled.source_documents is not None
    for row in range(len(batch)):
        source = filled.source[row][filled.source_documents[row] != PADDING].tolist()
        span = filled.targets[row][filled.targets[row] != IGNORED].tolist()
        hole = source.index(MASK)
        assert source[:hole] + span + source[hole + 1 :] == batch.tokens[row].tolist()
        written = filled.tokens[row][filled.documents[row] != PADDING].tolist()
        assert written == [MASK, *span[:-1]]


def test_a_span_stays_in_its_document_and_the_mask_stands_for_it(batch: Batch) -> None:
    filled = infill_spans(batch, 1, 0.3, MASK)
    assert filled.source is not None
    assert filled.source_documents is not None
    lengths = set()
    for row in range(len(batch)):
        ids = filled.documents[row][filled.documents[row] != PADDING]
        hole = int((filled.source[row] == MASK).nonzero()[0])
        assert (ids == filled.source_documents[row, hole]).all()
        lengths.add(len(ids))
    assert max(lengths) == round(0.3 * 128)
    assert len(lengths) > 1
