"""What the ranks of a process group tell each other about a sequence that they share.

Two things only. `fetch` and `swap` hand pieces of tensors from rank to rank, and their gradients
back (`_Exchange`); `Carry` passes the state of a recurrence, in a way of `models.ranks.schemes`.
Every rank calls every exchange, also where it has nothing to send, and uses what it returns,
because the backward pass is an exchange as well.
"""

import itertools
from collections.abc import Iterable

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from models.ranks.communicator import Communicator


class Spans:
    """Where the share of each rank begins and ends along the length that all of them share."""

    def __init__(self, lengths: Iterable[int]) -> None:
        ends = list(itertools.accumulate(lengths))
        self.each = list(zip([0, *ends[:-1]], ends, strict=True))
        self.total = ends[-1]

    def widened(self, left: int, right: int) -> list[tuple[int, int]]:
        """Each span, longer on both sides as far as there is anything."""
        return [(max(0, a - left), min(self.total, b + right)) for a, b in self.each]

    def before(self, left: int) -> list[tuple[int, int]]:
        """What lies at most so far before each span."""
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
    """Give each rank the stretch that it wants of a tensor whose shares the ranks hold.

    Args:
        x: this rank's share.
        spans: where the shares lie.
        wanted: begin and end of what each rank wants.
        ranks: who takes part.
        what: a name for the record.
    """
    mine, (begin, end) = spans.each[ranks.rank], wanted[ranks.rank]
    pieces = []
    for span in wanted:
        a, b = _overlap(mine, span)
        pieces.append(x[:, a - mine[0] : b - mine[0]])
    shapes = []
    for span in spans.each:
        a, b = _overlap(span, (begin, end))
        shapes.append(torch.Size((x.shape[0], b - a, *x.shape[2:])))
    return torch.cat(_Exchange.apply(ranks, shapes, what, *pieces), dim=1)


def swap(
    x: Float[Tensor, "B L E"], spans: Spans, ranks: Communicator, what: str
) -> Float[Tensor, "B T F"]:
    """Give up a share of the length with all channels for all of the length with some channels."""
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
    """A piece to each rank and from each rank; gradients go the other way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, ranks: Communicator, shapes: list[torch.Size], what: str, *pieces: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.what = ranks, what  # pyright: ignore[reportAttributeAccessIssue]
        ctx.sizes = [piece.shape for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(ranks.exchange(list(pieces), shapes, what))

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, *d_incoming: Tensor) -> tuple[Tensor | None, ...]:
        ranks, sizes, what = ctx.ranks, ctx.sizes, ctx.what  # pyright: ignore[reportAttributeAccessIssue]
        return (None, None, None, *ranks.exchange(list(d_incoming), sizes, f"{what} back"))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin = max(one[0], other[0])
    # Both within `one`, so that an empty overlap is an empty slice of it.
    begin = min(max(begin, one[0]), one[1])
    return begin, max(begin, min(one[1], other[1]))
