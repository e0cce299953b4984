"""Which ways there are to put the states of ranks together, what each takes, and which is fastest.

The state before a rank's tokens follows from what the tokens of all earlier ranks do to any state:
an exclusive prefix over the ranks. The time of a scheme is counted as that of rounds, one after
another, each of which takes a latency and the most bytes that a rank sends or receives in it over
the bandwidth of a rank. The few operations of putting states together are left out.
"""

import enum
from typing import NamedTuple


class Scheme(enum.StrEnum):
    """How the prefix over the ranks is found.

    Attributes:
        GATHER: everyone tells everyone in one collective, and each goes over the ranks before it
            (Sun et al. 2025, LASP-2, section 3).
        RING: each waits for the rank before it and tells the one after it (Sun et al. 2024,
            LASP-1, section 3); the least bytes.
        DOUBLING: in round k each tells the rank 2^k further what its last 2^k ranks do (Hillis and
            Steele 1986, made exclusive without a round of its own).
    """

    GATHER = "gather"
    RING = "ring"
    DOUBLING = "doubling"


class Link(NamedTuple):
    """What connects the ranks: each to all others, and each as fast out as in.

    Attributes:
        latency: seconds until the first byte of a message arrives.
        bandwidth: bytes per second that a rank sends, and receives at the same time.
    """

    latency: float
    bandwidth: float


ASSUMED = Link(latency=10e-6, bandwidth=25e9)
"""An assumption, not measured: one 200 Gb/s adapter a rank, and 10 us from a launch to arrival."""


class Payload(NamedTuple):
    """What a rank tells of its tokens.

    Attributes:
        state: bytes of the state that they leave.
        decay: bytes of the sums that say how any state decays over them.
        ways: 2 where half of the rows run from the last rank to the first, else 1.
    """

    state: int
    decay: int
    ways: int = 1


def choose(ranks: int, payload: Payload, link: Link) -> Scheme:
    """The scheme that takes the least time there and back; of equal ones, the first."""
    return min(Scheme, key=lambda scheme: seconds(scheme, ranks, payload, link))


def seconds(scheme: Scheme, ranks: int, payload: Payload, link: Link) -> float:
    """The time of the states' way there and that of their gradients' way back."""
    return (
        rounds(scheme, ranks) * 2 * link.latency + volume(scheme, ranks, payload) / link.bandwidth
    )


def rounds(scheme: Scheme, ranks: int) -> int:
    """Rounds that follow each other, one way."""
    if scheme is Scheme.GATHER:
        return min(1, ranks - 1)
    return ranks - 1 if scheme is Scheme.RING else (ranks - 1).bit_length()


def volume(scheme: Scheme, ranks: int, payload: Payload) -> float:
    """Bytes that the rounds there and back wait for, one after another.

    Decays are gathered once and not passed along a ring at all, as each rank has its own; doubling
    joins those of several ranks, and in either direction others.
    """
    state, decay, ways = payload
    if scheme is Scheme.GATHER:
        return float((ranks - 1) * (2 * state + decay))
    if scheme is Scheme.RING:
        # The two ways of an odd number meet at the rank in the middle, which takes both, and then
        # gives both.
        meetings = 2 if ways == 2 and ranks % 2 and ranks > 1 else 0
        return 2 * (ranks - 1 + meetings) * state / ways
    # The last distance is half of the ranks or more: none has one behind it and one before it.
    halved = 0.5 if ways == 2 and ranks > 1 else 0.0
    return 2 * (rounds(scheme, ranks) - halved) * (state + decay)
