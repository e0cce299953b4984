"""Bytes that each of several ranks sends for a layer, from the shape of what it must tell.

All shares have T tokens of one document a row. A list has a number for each rank. Widths are bytes
of all rows, so B tokens of so many channels in so many bytes each.
"""

import math


def stretches(ranks: int, T: int, left: int, right: int, width: int, *, back: bool) -> list[int]:
    """Where each rank receives so many tokens before its share and after it, across ranks.

    Args:
        T: tokens of a share.
        left: tokens before it that a rank wants.
        right: tokens after it.
        width: bytes of a token.
        back: for gradients, which go from the receiver to the sender.
    """

    def sent(sender: int, receiver: int) -> int:
        between = abs(receiver - sender) - 1
        wanted = left if receiver > sender else right
        return min(T, max(0, wanted - between * T))

    others = [[s for s in range(ranks) if s != r] for r in range(ranks)]
    return [
        width * sum(sent(s, r) if back else sent(r, s) for s in others[r]) for r in range(ranks)
    ]


def everything_before(tokens: list[int], width: int, *, back: bool) -> list[int]:
    """Where each rank hears all that the earlier ones have, of so many tokens each."""
    ranks = len(tokens)
    if back:
        return [width * sum(tokens[:r]) for r in range(ranks)]
    return [width * tokens[r] * (ranks - 1 - r) for r in range(ranks)]


def checkpoints(ranks: int, T: int, every: int) -> list[int]:
    """How many tokens end a segment in each share."""
    return [(r + 1) * T // every - r * T // every for r in range(ranks)]


def channels_swapped(ranks: int, T: int, channels: int, width: int) -> list[int]:
    """Where channels are shared out for whole rows, and the length for all channels again.

    The gradients take as much.

    Args:
        channels: which the ranks share out as evenly as they can.
        width: bytes of a token's channel.
    """
    mine = [channels * (r + 1) // ranks - channels * r // ranks for r in range(ranks)]
    return [width * T * ((channels - m) + (ranks - 1) * m) for m in mine]


def heads_swapped(ranks: int, tokens: int, sizes: tuple[int, int, int, int], number: int) -> float:
    """One way of an all-to-all over the heads of a Mamba-2: x, z and y, B and C, and dt.

    Args:
        tokens: of a share, of all rows.
        sizes: inner width E, groups G, state N and heads H.
        number: bytes of a number.
    """
    E, G, N, H = sizes
    return number * tokens * (ranks - 1) / ranks * (3 * E + 2 * max(G, ranks) * N + H)


def keys_turned_around(ranks: int, tokens: int, d_kv: int, number: int) -> int:
    """One way of ring attention: the keys and values of a share go round."""
    return number * tokens * 2 * d_kv * (ranks - 1)


def states_sent(scheme: str, ranks: int, inner: int, state: int, heads: int) -> float:
    """The most bytes that a rank sends of a Mamba-2's states, one way and one row, in float32."""
    message = 4 * (inner * state + heads)
    if scheme == "gather":
        return (ranks - 1) * message
    return 4 * inner * state if scheme == "ring" else math.ceil(math.log2(ranks)) * message
