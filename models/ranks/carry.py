"""Pass the state of a recurrence from rank to rank, and its gradient back."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from models.ranks.communicator import Communicator
from models.ranks.schemes import ASSUMED, Payload, Scheme, choose
from models.ranks.state_passing import STATE_PASSINGS, Decay, StatePassing, masked, real


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

    `publish` starts to send and `before` waits for the other ranks, so that other work may run in
    between. In the backward pass the gradient of the state before a rank's tokens is sent first,
    and the gradients of its summary wait for the answers.

    Args:
        keep: whether the state before each rank's tokens still counts after them, by row.
        turned: how many rows, the last ones, run from the last rank to the first.
        ranks: who takes part.
        scheme: how states are sent; None for the fastest over the assumed link.
    """

    def __init__(
        self,
        keep: Bool[Tensor, "R B"],
        turned: int,
        ranks: Communicator,
        scheme: Scheme | None = None,
    ) -> None:
        self.keep, self.turned, self.ranks, self.scheme = keep, turned, ranks, scheme
        self.passing: StatePassing | None = None
        self.initial: Tensor | None = None

    def publish(self, summary: Summary) -> Tensor:
        """Start to send this rank's summary; return the token that `before` takes."""
        token = _Publish.apply(self, *summary)
        assert isinstance(token, Tensor)
        return token

    def before(self, token: Tensor) -> Shaped[Tensor, "B *rest"]:
        """The state before this rank's tokens."""
        initial = _Receive.apply(self, token)
        assert isinstance(initial, Tensor)
        return initial

    def start(self, state: Tensor, decay: Decay) -> None:
        """Choose a scheme, and start sending."""
        scheme = self.scheme or choose(self.ranks.size, self._payload(state, decay), ASSUMED)
        self.passing = STATE_PASSINGS[scheme](self.keep, self.turned, decay, self.ranks)
        self.passing.start(state, back=False)

    def _payload(self, state: Tensor, decay: Decay) -> Payload:
        sums = 0 if decay.sums is None else decay.sums.numel() * real(state).element_size()
        return Payload(state.numel() * state.element_size(), sums, 2 if self.turned else 1)


class _Publish(torch.autograd.Function):
    """Forward: start sending. Backward: wait for the gradients that `_Receive` sent."""

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
        initial, passing = carry.initial, carry.passing
        assert initial is not None, "the state before the tokens was taken"
        assert passing is not None, "its gradient was sent"
        d_state, (sums, rates) = passing.finish(), passing.decay
        factor = passing.decay.factor(back=True)
        if sums is None or factor is None:
            return None, d_state, None, None
        d_log = masked(factor * initial.conj() * d_state, carry.keep[carry.ranks.rank])
        if rates is None:
            return None, d_state, d_log.sum_to_size(sums.shape), None
        d_sums = (d_log * rates.conj()).sum_to_size(sums.shape)
        d_rates = (d_log * sums).sum_to_size(rates.shape)
        return None, d_state, d_sums.real if d_sums.is_complex() else d_sums, d_rates


class _Receive(torch.autograd.Function):
    """Forward: wait for the state. Backward: start sending its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, carry: Carry, token: Tensor) -> Tensor:
        del token
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.passing is not None, "the summary was published"
        initial = carry.passing.finish()
        # Without its history: nothing frees an output that its own node holds.
        carry.initial = initial.detach()
        return initial

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_initial: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.passing is not None, "the summary was published"
        carry.passing.start(d_initial, back=True)
        return None, d_initial.new_empty(0)
