"""What the ranks of a process group tell each other about a sequence that they share.

Two things only. `fetch` and `swap` hand pieces of tensors from rank to rank, and their gradients
back (`_Exchange`); `Carry` passes the state of a recurrence, in one gather either way. Every rank
calls every exchange, also where it has nothing to send, and uses what it returns, because the
backward pass is an exchange as well.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable


class Sent(NamedTuple):
    """Bytes that this rank sent to others in one collective."""

    what: str
    bytes: int


class Ranks:
    """The ranks of a group, in order, and a record of what this one sent.

    Attributes:
        rank: this one's place.
        size: how many there are.
        sent: every collective so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: list[Sent] = []

    def gather(self, x: Shaped[Tensor, "*shape"], what: str) -> "Gathered":
        """Start to give everyone's tensor to everyone; shapes and dtypes are equal."""
        x = x.contiguous()
        everyones = [torch.empty_like(x) for _ in range(self.size)]
        work = dist.all_gather(everyones, x, group=self.group, async_op=True)
        assert work is not None, "this rank is in the group"
        self.sent.append(Sent(what, (self.size - 1) * x.numel() * x.element_size()))
        return Gathered(everyones, work)

    def exchange(self, pieces: list[Tensor], shapes: list[torch.Size], what: str) -> list[Tensor]:
        """Send a piece to each rank; return what each sent, of these shapes."""
        outgoing = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [shape.numel() for shape in shapes]
        incoming = outgoing.new_empty(sum(sizes))
        counts = [piece.numel() for piece in pieces]
        dist.all_to_all_single(incoming, outgoing, sizes, counts, group=self.group)
        others = sum(counts) - counts[self.rank]
        self.sent.append(Sent(what, others * outgoing.element_size()))
        return [x.view(s) for x, s in zip(incoming.split(sizes), shapes, strict=True)]


class Gathered(NamedTuple):
    """A gather under way."""

    everyones: list[Tensor]
    work: dist.Work

    def wait(self) -> list[Tensor]:
        """The tensor of each rank."""
        self.work.wait()
        return self.everyones


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
    ranks: Ranks,
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
    x: Float[Tensor, "B L E"], spans: Spans, ranks: Ranks, what: str
) -> Float[Tensor, "B T F"]:
    """Give up a share of the length with all channels for all of the length with some channels."""
    pieces = x.split(shares(x.shape[2], ranks.size), dim=2)
    mine = pieces[ranks.rank].shape[2]
    shapes = [torch.Size((x.shape[0], b - a, mine)) for a, b in spans.each]
    return torch.cat(_Exchange.apply(ranks, shapes, what, *pieces), dim=1)


def swap_back(
    x: Float[Tensor, "B T F"], channels: int, spans: Spans, ranks: Ranks, what: str
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
        ctx: FunctionCtx, ranks: Ranks, shapes: list[torch.Size], what: str, *pieces: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.what = ranks, what  # pyright: ignore[reportAttributeAccessIssue]
        ctx.sizes = [piece.shape for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(ranks.exchange(list(pieces), shapes, what))

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, *d_incoming: Tensor) -> tuple[Tensor | None, ...]:
        ranks, sizes, what = ctx.ranks, ctx.sizes, ctx.what  # pyright: ignore[reportAttributeAccessIssue]
        return (None, None, None, *ranks.exchange(list(d_incoming), sizes, f"{what} back"))


class Summary(NamedTuple):
    """What the tokens of a rank do to the state: after = exp(sums * rates) * before + state.

    Attributes:
        state: that after the last token, from zero, in float32 or wider; real or complex.
        sums: of the logs of the decays, or of what they are proportional to, which broadcasts to
            the state; None where nothing decays.
        rates: the factor of the sums, the same on every rank; None for 1.
    """

    state: Shaped[Tensor, "B *rest"]
    sums: Float[Tensor, "B *some"] | None = None
    rates: Shaped[Tensor, "*same"] | None = None


class Carry:
    """The states before the tokens of each rank, from a summary of each: one gather either way.

    `publish` starts the gather, and `before` waits for it, so that other work may run meanwhile. In
    the backward pass the gradient of the state before a rank's tokens starts a gather, and the
    gradients of its summary wait for that one.

    Args:
        keep: whether the state before each rank's tokens still counts after them, by row.
        turned: how many rows, the last ones, run from the last rank to the first.
        ranks: who takes part.
    """

    def __init__(self, keep: Bool[Tensor, "R B"], turned: int, ranks: Ranks) -> None:
        B, rank, last = keep.shape[1], ranks.rank, ranks.size - 1
        ahead, behind = list(range(rank)), list(range(last, rank, -1))
        rows = slice(0, B - turned), slice(B - turned, B)
        self.keep, self.ranks = keep, ranks
        self.earlier = list(zip(rows, (ahead, behind), strict=True))
        self.later = list(zip(rows, (behind, ahead), strict=True))
        self.under_way: Gathered | None = None
        self.sums: list[Tensor] = []
        self.rates: Tensor | None = None
        self.initial: Tensor | None = None

    def publish(self, summary: Summary) -> Tensor:
        """Start to tell the others; return what `before` takes."""
        token = _Publish.apply(self, *summary)
        assert isinstance(token, Tensor)
        return token

    def before(self, token: Tensor, like: Summary) -> Shaped[Tensor, "B *rest"]:
        """The state before this rank's tokens; `like` is what was published."""
        state, sums, rates = (None if x is None else x.detach() for x in like)
        assert state is not None, "only the rest may be left out"
        initial = _Take.apply(self, Summary(state, sums, rates), token)
        assert isinstance(initial, Tensor)
        return initial

    def run(
        self, added: list[Tensor], order: list[tuple[slice, list[int]]], *, back: bool = False
    ) -> Tensor:
        """Go over ranks, each with its decay and addend: c <- keep exp(log) c + added."""
        total = torch.zeros_like(added[0])
        for rows, ranks in order:
            for rank in ranks:
                decay = self.decay(rank, back=back)
                decayed = total[rows] if decay is None else decay[rows] * total[rows]
                total[rows] = _masked(decayed, self.keep[rank, rows]) + added[rank][rows]
        return total

    def decay(self, rank: int, *, back: bool = False) -> Tensor | None:
        """The factor of the state over the tokens of a rank, for gradients if `back`."""
        if not self.sums:
            return None
        log = self.sums[rank] if self.rates is None else self.sums[rank] * self.rates
        return torch.exp(log.conj() if back else log)


class _Publish(torch.autograd.Function):
    """Start the gather; the gradients wait for that of the way back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, carry: Carry, state: Tensor, sums: Tensor | None, rates: Tensor | None
    ) -> Tensor:
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        del rates
        parts = [_real(state)] if sums is None else [_real(state), sums]
        carry.under_way = carry.ranks.gather(_packed(parts), "state")
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, _: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        initial, rates, rank = carry.initial, carry.rates, carry.ranks.rank
        assert initial is not None, "the state before the tokens was taken"
        assert carry.under_way is not None, "its gradient was sent"
        heard = [_like(x, initial) for x in carry.under_way.wait()]
        d_state = carry.run(heard, carry.later, back=True)
        decay = carry.decay(rank, back=True)
        if decay is None:
            return None, d_state, None, None
        d_log = _masked(decay * initial.conj() * d_state, carry.keep[rank])
        sums = carry.sums[rank]
        if rates is None:
            return None, d_state, d_log.sum_to_size(sums.shape), None
        d_sums = (d_log * rates.conj()).sum_to_size(sums.shape)
        d_rates = (d_log * sums).sum_to_size(rates.shape)
        return None, d_state, d_sums.real if d_sums.is_complex() else d_sums, d_rates


class _Take(torch.autograd.Function):
    """Wait for the gather and go over the ranks before; the gradient starts the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, carry: Carry, like: Summary, token: Tensor) -> Tensor:
        del token
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.under_way is not None, "the summary was published"
        messages, size = carry.under_way.wait(), _real(like.state).numel()
        if like.sums is not None:
            # Copies: a view would keep the states of all ranks.
            carry.sums = [x[size:].view(like.sums.shape).clone() for x in messages]
        carry.rates = like.rates
        initial = carry.run([_like(x[:size], like.state) for x in messages], carry.earlier)
        # Without its history: nothing frees an output that its own node holds.
        carry.initial = initial.detach()
        return initial

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_initial: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        carry.under_way = carry.ranks.gather(_packed([_real(d_initial)]), "state back")
        return None, None, d_initial.new_empty(0)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin = max(one[0], other[0])
    # Both within `one`, so that an empty overlap is an empty slice of it.
    begin = min(max(begin, one[0]), one[1])
    return begin, max(begin, min(one[1], other[1]))


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _packed(parts: list[Tensor]) -> Tensor:
    return torch.cat([x.to(parts[0].dtype).reshape(-1) for x in parts])


def _like(numbers: Tensor, like: Tensor) -> Tensor:
    """One dimension of real numbers as a tensor of another's shape."""
    if like.is_complex():
        return torch.view_as_complex(numbers.view(*like.shape, 2))
    return numbers.view(like.shape)


def _masked(x: Tensor, keep: Bool[Tensor, "B"]) -> Tensor:
    return x.masked_fill(~keep.view(-1, *[1] * (x.ndim - 1)), 0.0)
