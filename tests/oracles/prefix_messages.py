"""The messages by which ranks learn what all ranks before them do to a state, round by round.

Nothing is sent: the messages are listed from the definition of each scheme, with the ranks whose
tokens each tells of. A round ends when its slowest rank has sent and received everything, and then
the next one begins.
"""

from collections import Counter
from typing import NamedTuple


class Message(NamedTuple):
    """What one rank tells another: the effect of the ranks from `first` to `last`, in their order.

    Attributes:
        way: 0 for rows that run from the first rank to the last, 1 for those that run back.
    """

    sender: int
    to: int
    bytes: int
    first: int
    last: int
    way: int


class Sizes(NamedTuple):
    """Bytes of a rank's state and of its decays, and into how many ways the rows are divided."""

    state: int
    decay: int
    ways: int


Rounds = list[list[Message]]


def messages(scheme: str, ranks: int, sizes: Sizes, *, back: bool) -> Rounds:
    """List the rounds of `gather`, `ring` or `doubling` for states, or for gradients if `back`."""
    if scheme == "gather":
        return _gather(ranks, sizes.state + (0 if back else sizes.decay))
    size = sizes.state if scheme == "ring" else sizes.state + sizes.decay
    ways = [_told(scheme, ranks, size // sizes.ways, way) for way in range(sizes.ways)]
    # Gradients of rows that run one way run the other way.
    turned = [way if (i == 1) == back else _mirrored(way, ranks) for i, way in enumerate(ways)]
    return [[m for way in rounds for m in way] for rounds in zip(*turned, strict=True)]


def seconds(rounds: Rounds, latency: float, bandwidth: float) -> float:
    """The time of rounds that each wait for the one before; ports are full duplex."""
    total = 0.0
    for each in rounds:
        out, into = Counter(), Counter()
        for message in each:
            out[message.sender] += message.bytes
            into[message.to] += message.bytes
        total += latency + max(*out.values(), *into.values()) / bandwidth
    return total


def sent(rounds: Rounds, rank: int) -> list[tuple[int, int]]:
    """Receiver and bytes of everything that a rank sends, in order."""
    return [(m.to, m.bytes) for each in rounds for m in each if m.sender == rank]


def learnt(rounds: Rounds, ranks: int, *, way: int, back: bool) -> list[list[int]]:
    """The ranks whose states each has at the end, in the order in which they come before it.

    Raises:
        ValueError: a rank sends a state that it does not have, or receives one twice.
    """
    known = [[] for _ in range(ranks)]
    for each in rounds:
        # All messages of a round send what was known before it.
        before = [list(ranks_known) for ranks_known in known]
        for message in (m for m in each if m.way == way):
            span = list(range(message.first, message.last + 1))
            unknown = set(span) - {message.sender, *before[message.sender]}
            if unknown or set(span) & set(known[message.to]):
                raise ValueError(f"{message} sends {unknown}, or what is known")
            known[message.to] += span
    descending = (way == 1) != back
    return [sorted(ranks_known, reverse=descending) for ranks_known in known]


def _gather(ranks: int, size: int) -> Rounds:
    others = [(r, s) for r in range(ranks) for s in range(ranks) if r != s]
    return [[Message(r, s, size, r, r, 0) for r, s in others]] if others else []


def _told(scheme: str, ranks: int, size: int, way: int) -> Rounds:
    if scheme == "ring":
        return [[Message(r, r + 1, size, 0, r, way)] for r in range(ranks - 1)]
    rounds, distance = [], 1
    while distance < ranks:
        rounds.append(
            [
                Message(r, r + distance, size, max(0, r - distance + 1), r, way)
                for r in range(ranks - distance)
            ]
        )
        distance *= 2
    return rounds


def _mirrored(rounds: Rounds, ranks: int) -> Rounds:
    last = ranks - 1
    return [
        [
            Message(last - m.sender, last - m.to, m.bytes, last - m.last, last - m.first, m.way)
            for m in each
        ]
        for each in rounds
    ]
