"""State passing between ranks as a differentiable operation (LASP: Sun et al. 2024, section 3)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from kernels.derivatives import ON_ONE_RANK, differentiated_once
from models.ranks.communicator import Communicator
from models.ranks.schemes import ASSUMED, Payload, Scheme, choose
from models.ranks.state_passing import STATE_PASSINGS, Decay, StatePassing, masked, real


class Summary(NamedTuple):
    """What a rank's tokens do to a state: after = exp(sums * rates) * before + state.

    Attributes:
        state: the state after the last token, from a zero state; float32 or wider, real or complex.
        sums: the sum of log decays, or of what they are proportional to, such as step sizes;
            broadcasts to the state; None without decay.
        rates: a factor of the sums, equal on all ranks and so never sent; None for 1.
    """

    state: Shaped[Tensor, "B *rest"]
    sums: Float[Tensor, "B *some"] | None = None
    rates: Shaped[Tensor, "*same"] | None = None


class Carry:
    """The state before each rank's tokens, from the summaries of all ranks.

    `publish` starts sending and `before` waits, so that computation between the two overlaps with
    communication. The backward pass mirrors this: the gradient of the state is sent first, and the
    gradients of the summary wait for those of the other ranks.

    Args:
        keep: per rank and row, whether the state before the rank's tokens still counts after them.
        n_reversed: number of rows, the last ones, that run from the last rank to the first.
        ranks: the communicator.
        scheme: how states are sent; None for the fastest over the assumed link.
    """

    def __init__(
        self,
        keep: Bool[Tensor, "R B"],
        n_reversed: int,
        ranks: Communicator,
        scheme: Scheme | None = None,
    ) -> None:
        self.keep, self.n_reversed, self.ranks, self.scheme = keep, n_reversed, ranks, scheme
        self.passing: StatePassing | None = None
        self.initial: Tensor | None = None

    def publish(self, summary: Summary) -> Tensor:
        """Start sending this rank's summary.

        Returns an empty tensor for `before`, which ties the two together in the autograd graph.
        """
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
        # All ranks compute the same costs, so they choose the same scheme.
        scheme = self.scheme or choose(self.ranks.size, self._payload(state, decay), ASSUMED)
        self.passing = STATE_PASSINGS[scheme](self.keep, self.n_reversed, decay, self.ranks)
        self.passing.start(state, backward=False)

    def _payload(self, state: Tensor, decay: Decay) -> Payload:
        sums = 0 if decay.sums is None else decay.sums.numel() * real(state).element_size()
        return Payload(state.numel() * state.element_size(), sums, 2 if self.n_reversed else 1)


class _Publish(torch.autograd.Function):
    """Forward: start sending the state. Backward: wait for the gradients that `_Receive` sent."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, carry: Carry, state: Tensor, sums: Tensor | None, rates: Tensor | None
    ) -> Tensor:
        ctx.carry = carry  # pyright: ignore[reportAttributeAccessIssue]
        # Detached: their history contains this node, so keeping it would be a reference cycle.
        carry.start(state.detach(), Decay(*(x if x is None else x.detach() for x in (sums, rates))))
        return state.new_empty(0)

    @staticmethod
    @differentiated_once("state passing between ranks", ON_ONE_RANK)
    def backward(ctx: BackwardCFunction, _: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        initial, passing = carry.initial, carry.passing
        assert initial is not None, "the state before the tokens was taken"
        assert passing is not None, "its gradient was sent"
        d_state, (sums, rates) = passing.finish(), passing.decay
        factor = passing.decay.factor(backward=True)
        if sums is None or factor is None:
            return None, d_state, None, None
        # after = exp(log) * before + state, so d_log = conj(exp(log) * before) * d_after.
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
        # Detached: a node that holds its own output is never freed.
        carry.initial = initial.detach()
        return initial

    @staticmethod
    @differentiated_once("state passing between ranks", ON_ONE_RANK)
    def backward(ctx: BackwardCFunction, d_initial: Tensor) -> tuple[Tensor | None, ...]:
        carry: Carry = ctx.carry  # pyright: ignore[reportAttributeAccessIssue]
        assert carry.passing is not None, "the summary was published"
        carry.passing.start(d_initial, backward=True)
        return None, d_initial.new_empty(0)
