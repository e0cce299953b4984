"""The held-out loss of a checkpoint on every evaluation set, in all and by document."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.evaluation_sets import (
    HeldOut,
    check_evaluation,
    evaluation_sets,
    held_out,
    spread,
    spread_groups,
)
from data_pipelines.manifest import Stream, read_manifest
from data_pipelines.tokenizers import load_tokenizer
from trainer.config import EvaluationConfig, RunConfig, check_hiding
from trainer.engine import Engine
from trainer.objective import IGNORED, prepare, token_nats
from trainer.record import Row
from trainer.schema import suggest
from untrusted.paths import inside

MASK_SEED = 0
"""What is hidden of a held-out sequence is the same for all runs."""


@dataclass(frozen=True)
class Figures:
    """The loss of one set: total nats over its targets and over their bytes.

    Attributes:
        subset: whether it is of the blocks that every milestone reads, else of all that results are
            computed from.
        documents: that have a target among what was read.
    """

    evaluation_set: str
    subset: bool
    blocks: int
    documents: int
    total_nats: float
    targets: int
    utf8_bytes: int
    evaluation_seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Total nats / ln 2 / UTF-8 bytes."""
        return self.total_nats / math.log(2) / self.utf8_bytes


@dataclass(frozen=True)
class Evaluated:
    """The loss of one set, and what each of its documents adds to it.

    Attributes:
        document_nats: summed loss of each document (documents,) [nats].
        document_targets: predicted tokens of each document (documents,).
    """

    figures: Figures
    document_nats: np.ndarray
    document_targets: np.ndarray

    def row(self) -> Row:
        """Its figures as columns of the record."""
        return {**asdict(self.figures), "bits_per_byte": self.figures.bits_per_byte}

    def documents(self) -> dict[str, list]:
        """The losses of its documents as the record stores them."""
        return {"nats": self.document_nats.tolist(), "targets": self.document_targets.tolist()}


class Evaluator:
    """Evaluates an engine's weights on all sets of a dataset.

    The batches of milestones are read once a process.
    """

    def __init__(self, run: RunConfig, config: EvaluationConfig, root: Path) -> None:
        check_hiding(run, config.mask_rate, "evaluation.mask_rate")
        corpus = run.corpus
        self._run, self._corpus, self._config, self._root = run, corpus, config, root
        check_evaluation(corpus, root, config.blocks_per_set)
        self.sets = evaluation_sets(root, corpus.dataset)
        for name in config.final_sets or ():
            if name not in self.sets:
                raise ValueError(
                    f"evaluation.final_sets has {name!r}, which dataset {corpus.dataset} lacks; "
                    f"{suggest(name, self.sets)}"
                )
        folder = inside(root, corpus.dataset)
        self._dataset = read_manifest(folder)
        self._byte_lengths = load_tokenizer(corpus.tokenizer, folder).byte_lengths

    def evaluate(self, engine: Engine, *, final: bool) -> Iterator[Evaluated]:
        """The loss of each set, summed over the ranks.

        Args:
            engine: holds the weights.
            final: whether to read all that results are computed from, beside the subset of the
                milestones.

        Raises:
            RuntimeError: there is no text to predict in some sets; raised after the others.
        """
        empty: list[str] = []
        engine.backbone.eval()
        for name in self.sets:
            begin = time.perf_counter()
            described = read_manifest(inside(self._root, self._corpus.dataset)).stream(
                name, "validation"
            )
            every, subset = self._groups(name, described)
            sums = [_Sums(subset), *([_Sums(every)] if final else [])]
            batches = self._whole(described, every) if final else self._milestone(described, subset)
            ranks = engine.ranks
            for place, held in enumerate(batches):
                mine = place % ranks.data_ranks == ranks.data_rank
                measured = self._measure(engine, held.batch) if mine else None
                for each in sums:
                    each.add(held, measured, self._byte_lengths)
            for is_subset, each in zip((True, False), sums, strict=False):
                seconds = time.perf_counter() - begin
                result = each.evaluated(
                    engine, name, is_subset, self._corpus.joined_blocks, seconds
                )
                if result.figures.targets and result.figures.utf8_bytes:
                    yield result
                else:
                    empty.append(name)
        engine.backbone.train()
        if empty:
            raise RuntimeError(
                f"evaluation sets {', '.join(dict.fromkeys(empty))} of {self._corpus.dataset} have "
                "no text to predict in the blocks that are read, so no loss; raise "
                f"evaluation.blocks_per_set {self._config.blocks_per_set}, or give documents of "
                "more text"
            )

    def _groups(self, name: str, described: Stream) -> tuple[list[int], list[int]]:
        """The groups of blocks that are read at the end, and those of them for milestones."""
        every = spread_groups(self._corpus, described, self._config.final_blocks(name))
        return every, spread(every, self._config.blocks_per_set // self._corpus.joined_blocks)

    def _whole(self, described: Stream, groups: list[int]) -> Iterator[HeldOut]:
        size = self._config.batch_sequences
        return held_out(self._corpus, self._root, described, groups, size)

    def _milestone(self, described: Stream, groups: list[int]) -> list[HeldOut]:
        key = (self._root, repr(self._corpus), described.folder, repr(self._config))
        if key not in _batches:
            _batches[key] = list(self._whole(described, groups))
        return _batches[key]

    def _measure(self, engine: Engine, plain: Batch) -> tuple[Batch, Tensor]:
        """This rank's part of a batch, and the loss of each of its targets."""
        whole = prepare(plain, self._run, MASK_SEED, self._config.mask_rate)
        batch = engine.own_part(whole)
        with torch.no_grad(), engine.autocast():
            wanted = batch.targets.to(engine.device)
            nats = token_nats(engine.backbone, engine.hidden(batch), wanted)
        return batch, nats.cpu()


_batches: dict[tuple, list[HeldOut]] = {}


class _Sums:
    """The sums of one set over some of its groups of blocks, on one rank and then over all."""

    def __init__(self, groups: list[int]) -> None:
        self._groups = groups
        self._nats, self._bytes = 0.0, 0
        self._by_document = np.zeros((2, 0))

    def add(
        self, held: HeldOut, measured: tuple[Batch, Tensor] | None, byte_lengths: np.ndarray
    ) -> None:
        """Add a batch: its documents on every rank, its losses on the one that measured them."""
        documents = int(held.first_documents.max() + held.batch.documents.max()) + 1
        more = max(documents - self._by_document.shape[1], 0)
        self._by_document = np.pad(self._by_document, ((0, 0), (0, more)))
        if measured is None:
            return
        batch, nats = measured
        chosen = np.isin(held.groups, self._groups)
        nats = nats[torch.from_numpy(chosen)].double()
        targets = batch.targets.numpy()[chosen]
        there = targets != IGNORED
        self._nats += float(nats.sum())
        self._bytes += int(byte_lengths[targets[there]].sum())
        place = held.first_documents[chosen, None] + batch.documents.numpy()[chosen]
        for sums, weights in zip(self._by_document, (nats.numpy()[there], None), strict=True):
            sums += np.bincount(place[there], weights, minlength=len(sums))

    def evaluated(
        self, engine: Engine, name: str, subset: bool, joined: int, seconds: float
    ) -> Evaluated:
        """The result over all ranks; documents without a target are left out."""
        ranks = engine.ranks
        (nats,) = ranks.sum_floats([self._nats])
        (read,) = ranks.sum_integers([self._bytes])
        by_document = np.array(ranks.sum_floats(self._by_document.ravel().tolist())).reshape(2, -1)
        nats_of, targets_of = by_document[:, by_document[1] > 0]
        figures = Figures(
            evaluation_set=name,
            subset=subset,
            blocks=joined * len(self._groups),
            documents=len(targets_of),
            total_nats=nats,
            targets=int(targets_of.sum()),
            utf8_bytes=read,
            evaluation_seconds=seconds,
        )
        return Evaluated(figures, nats_of, targets_of.astype(np.int64))
