"""What the ranks of a process group tell each other about a sequence that they share.

Two things only. `fetch` and `swap` hand pieces of tensors from rank to rank, and their gradients
back (`_Exchange`); `Carry` passes the state of a recurrence, in a way of `models.ranks.schemes`.
Every rank calls every exchange, also where it has nothing to send, and uses what it returns,
because the backward pass is an exchange as well.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from models.ranks.communicator import Ranks
from models.ranks.schemes import ASSUMED, Payload, Scheme, choose
from models.ranks.state_passing import RELAYS, Decay, Relay, masked, real


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
    """The states before the tokens of each rank, from a summary of each.

    `publish` starts to tell the others, and `before` waits for them, so that other work may run
    meanwhile. In the backward pass the gradient of the state before a rank's tokens starts the way
    back, and the gradients of its summary wait for that one.

    Args:
        keep: whether the state before each rank's tokens still counts after them, by row.
        turned: how many rows, the last ones, run from the last rank to the first.
        ranks: who takes part.
        scheme: how they tell each other; None for the fastest over the link that is assumed.
    """

    def __init__(
        self,
        keep: Bool[Tensor, "R B"],
        turned: int,
        ranks: Ranks,
        scheme: Scheme | None = None,
    ) -> None:
        self.keep, self.turned, self.ranks, self.scheme = keep, turned, ranks, scheme
        self.relay: Relay | None = None
        self.initial: Tensor | None = None

    def publish(self, summary: Summary) -> Tensor:
        """Start to tell the others; return what `before` takes."""
        token = _Publish.apply(self, *summary)
        assert isinstance(token, Tensor)
        return token

    def before(self, token: Tensor) -> Shaped[Tensor, "B *rest"]:
        """The state before this rank's tokens."""
        initial = _Take.apply(self, token)
        assert isinstance(initial, Tensor)
        return initial

    def start(self, state: Tensor, decay: Decay) -> None:
        """Choose how to tell the others, and start."""
        scheme = self.scheme or choose(self.ranks.size, self._payload(state, decay), ASSUMED)
        self.relay = RELAYS[scheme](self.keep, self.turned, decay, self.ranks)
        self.relay.start(state, back=False)

    def _payload(self, state: Tensor, decay: Decay) -> Payload:
        sums = 0 if decay.sums is None else decay.sums.numel() * real(state).element_size()
        return Payload(state.numel() * state.element_size(), sums, 2 if self.turned else 1)


class _Publish(torch.autograd.Function):
    """Start the way there; the gradients wait for the way back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, carry: Carry, state: Tensor, sums: Tensor | None, rates: Tensor | None
    ) -> Tensor:
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        # Without their history, which would keep the graph that holds this node.
        carry.start(state.detach(), Decay(*(x if x is None else x.detach() for x in (sums, rates))))
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, _: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        initial, relay = carry.initial, carry.relay
        assert initial is not None, "the state before the tokens was taken"
        assert relay is not None, "its gradient was sent"
        d_state, (sums, rates) = relay.finish(), relay.decay
        factor = relay.decay.factor(back=True)
        if sums is None or factor is None:
            return None, d_state, None, None
        d_log = masked(factor * initial.conj() * d_state, carry.keep[carry.ranks.rank])
        if rates is None:
            return None, d_state, d_log.sum_to_size(sums.shape), None
        d_sums = (d_log * rates.conj()).sum_to_size(sums.shape)
        d_rates = (d_log * sums).sum_to_size(rates.shape)
        return None, d_state, d_sums.real if d_sums.is_complex() else d_sums, d_rates


class _Take(torch.autograd.Function):
    """Wait for the way there; the gradient starts the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, carry: Carry, token: Tensor) -> Tensor:
        del token
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.relay is not None, "the summary was published"
        initial = carry.relay.finish()
        # Without its history: nothing frees an output that its own node holds.
        carry.initial = initial.detach()
        return initial

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_initial: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.relay is not None, "the summary was published"
        carry.relay.start(d_initial, back=True)
        return None, d_initial.new_empty(0)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    begin = max(one[0], other[0])
    # Both within `one`, so that an empty overlap is an empty slice of it.
    begin = min(max(begin, one[0]), one[1])
    return begin, max(begin, min(one[1], other[1]))
