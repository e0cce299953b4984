"""The held-out loss of a checkpoint on every evaluation set."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipelines.batch import Batch, target_bytes
from data_pipelines.evaluation_sets import check_evaluation, evaluation_batches, evaluation_sets
from data_pipelines.tokenizers import load_tokenizer
from trainer.config import EvaluationConfig, RunConfig
from trainer.engine import Engine
from trainer.objective import IGNORED, prepare, token_nats
from untrusted.paths import inside

MASK_SEED = 0
"""What is hidden of a held-out sequence is the same for all runs."""


@dataclass(frozen=True)
class Evaluated:
    """The loss of one set: total nats over its targets and over their bytes."""

    evaluation_set: str
    total_nats: float
    targets: int
    utf8_bytes: int
    evaluation_seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Total nats / ln 2 / UTF-8 bytes."""
        return self.total_nats / math.log(2) / max(self.utf8_bytes, 1)


class Evaluator:
    """Evaluates an engine's weights on all sets of a dataset; batches are read once a process."""

    def __init__(self, run: RunConfig, config: EvaluationConfig, root: Path) -> None:
        corpus = run.corpus
        self._run, self._corpus, self._config, self._root = run, corpus, config, root
        check_evaluation(corpus, root, config.blocks_per_set)
        self.sets = evaluation_sets(root, corpus.dataset)
        self._byte_lengths = load_tokenizer(
            corpus.tokenizer, inside(root, corpus.dataset)
        ).byte_lengths

    def evaluate(self, engine: Engine) -> Iterator[Evaluated]:
        """The loss of each set, summed over the ranks."""
        for name in self.sets:
            yield self._evaluate(engine, name)

    def _evaluate(self, engine: Engine, name: str) -> Evaluated:
        begin = time.perf_counter()
        nats, targets, read = 0.0, 0, 0
        engine.backbone.eval()
        for plain in self._share(engine, name):
            whole = prepare(plain, self._run, MASK_SEED, self._config.mask_rate)
            batch = engine.own_part(whole)
            with torch.no_grad(), engine.autocast():
                wanted = batch.targets.to(engine.device)
                each = token_nats(engine.backbone, engine.hidden(batch), wanted)
            nats += float(each.double().sum())
            targets += int((batch.targets != IGNORED).sum())
            read += target_bytes(batch, self._byte_lengths)
        engine.backbone.train()
        (nats,) = engine.ranks.sum_floats([nats])
        targets, read = engine.ranks.sum_integers([targets, read])
        return Evaluated(name, nats, targets, read, time.perf_counter() - begin)

    def _share(self, engine: Engine, name: str) -> list[Batch]:
        """The batches of this rank's sequence group; a later group may get fewer."""
        config, corpus, ranks = self._config, self._corpus, engine.ranks
        place = (self._root, corpus.dataset, name, corpus.seq_len)
        share = (ranks.data_rank, ranks.data_ranks)
        key = (*place, config.batch_sequences, config.blocks_per_set, *share)
        if key not in _batches:
            batches = evaluation_batches(
                corpus,
                self._root,
                name,
                batch_sequences=config.batch_sequences,
                max_blocks=config.blocks_per_set,
            )
            _batches[key] = list(itertools.islice(batches, share[0], None, share[1]))
        return _batches[key]


_batches: dict[tuple, list[Batch]] = {}
