"""Communication schemes for state passing, and a cost model that chooses among them.

The state before a rank's tokens is an exclusive prefix over the ranks: it combines what the tokens
of all earlier ranks do to a state. The cost model adds up rounds; a round costs the latency, and
the most bytes that any rank sends or receives in it over the bandwidth. Arithmetic is neglected.
"""

import enum
from typing import NamedTuple


class Scheme(enum.StrEnum):
    """How the prefix over the ranks is computed.

    Attributes:
        GATHER: one all-gather; each rank then combines the summaries of the ranks before it (Sun
            et al. 2025, LASP-2, section 3).
        RING: each rank receives from the rank before it and sends to the one after it (Sun et al.
            2024, LASP-1, section 3); the fewest bytes.
        DOUBLING: recursive doubling; in round k each rank sends the summary of the last 2^k ranks
            to the rank 2^k further (Hillis and Steele 1986, made exclusive without another round).
    """

    GATHER = "gather"
    RING = "ring"
    DOUBLING = "doubling"


class Link(NamedTuple):
    """The network between the ranks: fully connected and full duplex.

    Attributes:
        latency: seconds until the first byte of a message arrives.
        bandwidth: bytes per second that a rank sends, and receives at the same time.
    """

    latency: float
    bandwidth: float


ASSUMED = Link(latency=10e-6, bandwidth=25e9)
"""An assumption, not measured: one 200 Gb/s adapter a rank, and 10 us from a launch to arrival."""


class Payload(NamedTuple):
    """The size of the summary that a rank sends of its tokens.

    Attributes:
        state: bytes of the state after its tokens.
        decay: bytes of the summed log decays.
        directions: 2 if half of the rows run from the last rank to the first, else 1.
    """

    state: int
    decay: int
    directions: int = 1


def choose(ranks: int, payload: Payload, link: Link) -> Scheme:
    """The fastest scheme for a forward and a backward pass; the first of equal ones."""
    return min(Scheme, key=lambda scheme: seconds(scheme, ranks, payload, link))


def seconds(scheme: Scheme, ranks: int, payload: Payload, link: Link) -> float:
    """Time of passing the states forward and their gradients backward."""
    return (
        rounds(scheme, ranks) * 2 * link.latency + volume(scheme, ranks, payload) / link.bandwidth
    )


def rounds(scheme: Scheme, ranks: int) -> int:
    """Consecutive rounds of one pass."""
    if scheme is Scheme.GATHER:
        return min(1, ranks - 1)
    return ranks - 1 if scheme is Scheme.RING else (ranks - 1).bit_length()


def volume(scheme: Scheme, ranks: int, payload: Payload) -> float:
    """Bytes on the critical path of both passes.

    GATHER sends decays once, as the backward pass needs the same; RING sends none, as each rank
    applies its own; DOUBLING sends combined decays, which differ between the passes.
    """
    state, decay, directions = payload
    if scheme is Scheme.GATHER:
        return float((ranks - 1) * (2 * state + decay))
    if scheme is Scheme.RING:
        # With an odd number of ranks both directions reach the middle rank in the same round: it
        # receives two states, then sends two.
        meetings = 2 if directions == 2 and ranks % 2 and ranks > 1 else 0
        return 2 * (ranks - 1 + meetings) * state / directions
    # In the last round the distance is at least half of the ranks, so no rank sends or receives in
    # both directions.
    halved = 0.5 if directions == 2 and ranks > 1 else 0.0
    return 2 * (rounds(scheme, ranks) - halved) * (state + decay)
