"""n-gram models against dictionaries of counts."""

import math

import numpy as np
import pytest
import torch

from data_pipelines.batch import IGNORED, Batch
from data_pipelines.ngram import NGram
from tests.oracles import ngram as oracle

VOCAB = 7


def make(lengths: list[int], seed: int) -> tuple[Batch, list[list[int]]]:
    """One row of documents, as a batch and as lists."""
    draw = np.random.default_rng(seed)
    documents = [draw.integers(0, VOCAB, n).tolist() for n in lengths]
    for document in documents:
        document[1:] = [(a + int(draw.integers(0, 2))) % VOCAB for a in document[:-1]]
    ids = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.concatenate([np.array(d) for d in documents])
    targets = np.where(np.append(ids[1:] == ids[:-1], False), np.append(tokens[1:], 0), IGNORED)
    parts = (torch.from_numpy(part)[None] for part in (tokens, targets, ids))
    return Batch(*parts, np.zeros(1)), documents


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_losses_equal_those_of_dictionaries_of_counts(order: int) -> None:
    train, train_documents = make([5, 1, 40, 17], 0)
    test, test_documents = make([3, 30, 2], 1)
    got = NGram(order, VOCAB).fit([train]).total_nats(test)
    wanted = oracle.total_nats(train_documents, test_documents, order, VOCAB)
    assert got == pytest.approx(wanted, rel=1e-12)


def test_chances_of_all_tokens_sum_to_one() -> None:
    train, _ = make([50], 0)
    model = NGram(3, VOCAB).fit([train])
    total = 0.0
    for token in range(VOCAB):
        tokens, targets = torch.tensor([[1, 2]]), torch.tensor([[IGNORED, token]])
        batch = Batch(tokens, targets, torch.zeros(1, 2, dtype=torch.int64), np.zeros(1))
        total += math.exp(-model.total_nats(batch))
    assert total == pytest.approx(1, rel=1e-12)


def test_an_order_that_cannot_be_numbered_is_refused() -> None:
    with pytest.raises(ValueError, match="order 5 at 32000 ids is too large"):
        NGram(5, 32_000)
