"""How many blocks of each domain an epoch gets, and how often a run reads them.

A share of an epoch is rarely a whole number of blocks. What is rounded off in one epoch is carried
to the next, so that after any number of epochs each domain has its share to within two blocks: one,
but for a few epochs of many small domains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from data_pipelines.config import DataConfig
from data_pipelines.manifest import Manifest

REPEATED = 1.001
"""Reads a distinct block from which on text counts as repeated."""


class Apportionment:
    """The groups that each epoch takes of each domain.

    Args:
        shares: of the domains; they need not sum to exactly 1.
        groups: of an epoch.
        first: groups of the first epoch, kept if they are the shares to within one group.
    """

    def __init__(self, shares: Sequence[float], groups: int, first: Sequence[int]) -> None:
        # As decimals: 0.29 is meant, and not the binary fraction next to it.
        exact = [Fraction(repr(float(share))) for share in shares]
        self._quotas = [groups * share / sum(exact) for share in exact]
        self._groups = groups
        fits = all(abs(n - q) < 1 for n, q in zip(first, self._quotas, strict=True))
        self._epochs = [[int(n) for n in first] if fits else apportion(self._quotas, groups)]
        self._given = list(self._epochs[0])

    def __getitem__(self, epoch: int) -> list[int]:
        """Groups of each domain in an epoch."""
        while len(self._epochs) <= epoch:
            asked = (quota * (len(self._epochs) + 1) for quota in self._quotas)
            open_ = [a - given for a, given in zip(asked, self._given, strict=True)]
            self._epochs.append(apportion(open_, self._groups))
            self._given = [a + b for a, b in zip(self._given, self._epochs[-1], strict=True)]
        return self._epochs[epoch]


def apportion(asked: Sequence[Fraction], groups: int) -> list[int]:
    """Whole numbers next to what is asked that sum to `groups`: those rounded off most gain one.

    Args:
        asked: sums to `groups`; below 0 for a domain that had too much before.
        groups: of all domains.
    """
    given = [max(math.floor(a), 0) for a in asked]
    order = sorted(range(len(given)), key=lambda i: (given[i] - asked[i], i))
    for i in order[: max(groups - sum(given), 0)]:
        given[i] += 1
    # Where some had too much before, those that are given most beyond what they ask for lose one.
    while sum(given) > groups:
        most = max((i for i in order if given[i]), key=lambda i: given[i] - asked[i])
        given[most] -= 1
    assert sum(given) == groups
    return given


def require_amounts(corpus: DataConfig, tokens: int) -> None:
    """Check that a run of so many tokens reads at least one block of every domain.

    Raises:
        ValueError: a share is too small for that.
    """
    groups = tokens / (corpus.joined_blocks * corpus.block_tokens)
    for domain, share in corpus.domains.items():
        if share * groups < 1:
            raise ValueError(
                f"corpus.domains.{domain} is {share} of the {groups:.6g} blocks that budget.tokens "
                f"{tokens} reads, less than one; raise the share or the budget, or leave it out"
            )


@dataclass(frozen=True)
class Repeats:
    """How often a run is expected to read a domain.

    Attributes:
        blocks: that it reads.
        available: blocks that it reads from.
        times: reads of each distinct block that it reads, on average.
    """

    blocks: float
    available: int
    times: float


def expected_repeats(corpus: DataConfig, manifest: Manifest, tokens: int) -> dict[str, Repeats]:
    """How often a run of so many tokens reads each domain.

    Raises:
        ValueError: the dataset lacks a domain, or has less text than `unique_bytes`.
    """
    found = {}
    for domain, share in corpus.domains.items():
        stream = manifest.stream(domain, "train")
        left, available = unique_blocks(corpus, manifest, domain), 0
        for shard in stream.shards:
            # Blocks that fill no group of joined ones are not read.
            available += min(shard.samples, left) // corpus.joined_blocks * corpus.joined_blocks
            left -= min(shard.samples, left)
        blocks = share * tokens / corpus.block_tokens
        found[domain] = Repeats(blocks, available, _times(corpus, share, blocks, available))
    return found


def unique_blocks(corpus: DataConfig, manifest: Manifest, domain: str) -> int:
    """Leading blocks of a domain that hold its share of `unique_bytes`.

    Raises:
        ValueError: it has less, or its share is less than a block.
    """
    stream = manifest.stream(domain, "train")
    if corpus.unique_bytes is None:
        return stream.blocks
    wanted = corpus.unique_bytes * corpus.domains[domain]
    blocks = round(wanted * stream.blocks / stream.utf8_bytes)
    if blocks > stream.blocks:
        most = stream.utf8_bytes / corpus.domains[domain]
        raise ValueError(
            f"corpus.unique_bytes {corpus.unique_bytes} asks for {wanted:.0f} bytes of "
            f"{domain}, which has {stream.utf8_bytes}; choose at most {int(most)}"
        )
    if not blocks:
        raise ValueError(
            f"corpus.unique_bytes {corpus.unique_bytes} asks for {wanted:.0f} bytes of {domain}, "
            f"less than a block of about {stream.utf8_bytes / stream.blocks:.0f}; choose more"
        )
    return blocks


def _times(corpus: DataConfig, share: float, blocks: float, available: int) -> float:
    """Blocks over distinct ones, where every epoch draws anew."""
    if not available or not blocks:
        return 1.0
    an_epoch = min(share * corpus.epoch_blocks, blocks)
    epochs = blocks / an_epoch
    missed = max(1 - an_epoch / available, 0.0) ** epochs
    return blocks / (available * (1 - missed))
