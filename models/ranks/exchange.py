"""Differentiable exchanges of tensor slices between the ranks that share a sequence.

`fetch` gives each rank a slice of a tensor that is sharded along the length; `swap` is the
all-to-all between sharding the length and sharding the channels. The backward pass of each is an
exchange too, so every rank must call every exchange, even with nothing to send, and use its result.
The state of a recurrence is passed by `models.ranks.carry`.
"""

import itertools
from collections.abc import Iterable

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import ON_ONE_RANK, differentiated_once
from models.ranks.communicator import Communicator


class Spans:
    """Begin and end of each rank's shard along the length."""

    def __init__(self, lengths: Iterable[int]) -> None:
        ends = list(itertools.accumulate(lengths))
        self.each = list(zip([0, *ends[:-1]], ends, strict=True))
        self.total = ends[-1]

    def widened(self, left: int, right: int) -> list[tuple[int, int]]:
        """Each span, extended on both sides but not beyond the sequence."""
        return [(max(0, a - left), min(self.total, b + right)) for a, b in self.each]

    def before(self, left: int) -> list[tuple[int, int]]:
        """The `left` places before each span, or fewer at the beginning of the sequence."""
        return [(max(0, a - left), a) for a, _ in self.each]

    def up_to(self) -> list[tuple[int, int]]:
        """Everything up to the end of each span."""
        return [(0, b) for _, b in self.each]


def fetch(
    x: Num[Tensor, "B L *rest"],
    spans: Spans,
    wanted: list[tuple[int, int]],
    ranks: Communicator,
    what: str,
) -> Num[Tensor, "B W *rest"]:
    """Give each rank the slice that it wants of a tensor sharded along the length.

    Args:
        x: this rank's shard.
        spans: the shards of all ranks.
        wanted: begin and end of the slice for each rank.
        ranks: the communicator.
        what: a name for the record of sent bytes.
    """
    mine, (begin, end) = spans.each[ranks.rank], wanted[ranks.rank]
    pieces = []
    for span in wanted:
        # What this rank has of the slice that another one wants.
        a, b = _overlap(mine, span)
        pieces.append(x[:, a - mine[0] : b - mine[0]])
    shapes = []
    for span in spans.each:
        # What another rank has of the slice that this one wants.
        a, b = _overlap(span, (begin, end))
        shapes.append(torch.Size((x.shape[0], b - a, *x.shape[2:])))
    return torch.cat(_Exchange.apply(ranks, shapes, what, *pieces), dim=1)


def swap(
    x: Float[Tensor, "B L E"], spans: Spans, ranks: Communicator, what: str
) -> Float[Tensor, "B T F"]:
    """All-to-all from a shard of the length to the whole length of a shard of the channels."""
    pieces = x.split(shares(x.shape[2], ranks.size), dim=2)
    mine = pieces[ranks.rank].shape[2]
    shapes = [torch.Size((x.shape[0], b - a, mine)) for a, b in spans.each]
    return torch.cat(_Exchange.apply(ranks, shapes, what, *pieces), dim=1)


def swap_back(
    x: Float[Tensor, "B T F"], channels: int, spans: Spans, ranks: Communicator, what: str
) -> Float[Tensor, "B L E"]:
    """Undo `swap`."""
    begin, end = spans.each[ranks.rank]
    pieces = [x[:, a:b] for a, b in spans.each]
    counts = shares(channels, ranks.size)
    shapes = [torch.Size((x.shape[0], end - begin, count)) for count in counts]
    return torch.cat(_Exchange.apply(ranks, shapes, what, *pieces), dim=2)


def shares(count: int, parts: int) -> list[int]:
    """Cut a number into so many parts that differ by 1 at most."""
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


class _Exchange(torch.autograd.Function):
    """An all-to-all; in the backward pass gradients return to the rank that sent the slice."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, ranks: Communicator, shapes: list[torch.Size], what: str, *pieces: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.what = ranks, what  # pyright: ignore[reportAttributeAccessIssue]
        ctx.sizes = [piece.shape for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(ranks.exchange(list(pieces), shapes, what))

    @staticmethod
    @differentiated_once("an exchange between ranks", ON_ONE_RANK)
    def backward(ctx: BackwardCFunction, *d_incoming: Tensor) -> tuple[Tensor | None, ...]:
        ranks, sizes, what = ctx.ranks, ctx.sizes, ctx.what  # pyright: ignore[reportAttributeAccessIssue]
        return (None, None, None, *ranks.exchange(list(d_incoming), sizes, f"{what} gradient"))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin = max(one[0], other[0])
    # Both within `one`, so that an empty overlap is an empty slice of it.
    begin = min(max(begin, one[0]), one[1])
    return begin, max(begin, min(one[1], other[1]))
