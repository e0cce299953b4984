"""State passing under each scheme of `models.ranks.schemes`.

The recurrence over the ranks is c <- keep * exp(log) * c + added, and each rank needs the c before
its tokens. It is solved twice: for the states and, in the backward pass, for their gradients, with
the same decays in the opposite direction. `start` sends what does not depend on other ranks;
`finish` waits for the rest.
"""

import abc
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from models.ranks.communicator import Communicator, PendingGather, PendingTransfer
from models.ranks.schemes import Scheme


class Decay(NamedTuple):
    """The decay of a state over a rank's tokens, exp(sums * rates).

    Attributes:
        sums: the sum of log decays, or of what they are proportional to; None without decay.
        rates: a factor of the sums, equal on all ranks; None for 1.
    """

    sums: Float[Tensor, "B *some"] | None
    rates: Shaped[Tensor, "*same"] | None

    def applied(self, state: Tensor, *, backward: bool) -> Tensor:
        """The state decayed or, if `backward`, the gradient with respect to it."""
        factor = self.factor(backward=backward)
        return state if factor is None else factor * state

    def factor(self, *, backward: bool) -> Tensor | None:
        """The factor of a state or, if `backward`, of its gradient; None for 1."""
        if self.sums is None:
            return None
        log = self.sums if self.rates is None else self.sums * self.rates
        # A complex gradient is multiplied by the conjugate of the factor, as torch defines it.
        return torch.exp(log.conj() if backward else log)

    def of(self, sums: Tensor | None) -> "Decay":
        """The decay over other tokens."""
        return Decay(sums, self.rates)

    def of_rows(self, rows: slice) -> "Decay":
        """The decay of some of the rows."""
        return self if self.sums is None else self.of(self.sums[rows])


class Direction(NamedTuple):
    """Rows whose states go from rank to rank in one direction, seen from one rank.

    Attributes:
        behind: the ranks that come before it, from the first to the nearest.
        ahead: the ranks that come after it, from the nearest on.
    """

    rows: slice
    behind: list[int]
    ahead: list[int]

    def opposite(self) -> "Direction":
        """The same rows in the opposite direction."""
        return Direction(self.rows, self.ahead[::-1], self.behind[::-1])


class StatePassing(abc.ABC):
    """Computes the state before each rank's tokens, then the gradient of the state after them.

    Args:
        keep: per rank and row, whether the state before the rank's tokens still counts after them.
        n_reversed: number of rows, the last ones, that run from the last rank to the first.
        decay: the decay over this rank's tokens.
        ranks: the communicator.
    """

    def __init__(
        self, keep: Bool[Tensor, "R B"], n_reversed: int, decay: Decay, ranks: Communicator
    ) -> None:
        B, rank = keep.shape[1], ranks.rank
        earlier, later = list(range(rank)), list(range(rank + 1, ranks.size))
        left_to_right = Direction(slice(0, B - n_reversed), earlier, later)
        right_to_left = Direction(slice(B - n_reversed, B), later[::-1], earlier[::-1])
        directions = [
            direction
            for direction in (left_to_right, right_to_left)
            if direction.rows.start < direction.rows.stop
        ]
        self.keep, self.decay, self.ranks = keep, decay, ranks
        self.forward_directions, self.directions = directions, directions
        self.backward, self.what, self.tag = False, "state", 0
        self.added: Tensor | None = None

    def start(self, added: Shaped[Tensor, "B *rest"], *, backward: bool) -> None:
        """Start with what this rank adds: a state or, if `backward`, a gradient.

        Gradients go in the opposite direction.
        """
        self.directions = self.forward_directions
        if backward:
            self.directions = [direction.opposite() for direction in self.forward_directions]
        self.backward, self.what = backward, "state gradient" if backward else "state"
        # A new tag per pass: states of two layers may be in flight between the same ranks.
        self.tag = self.ranks.tag()
        self.added = added
        self.begin(added)

    def finish(self) -> Shaped[Tensor, "B *rest"]:
        """Wait, and return the state (or gradient) that reaches this rank."""
        assert self.added is not None, "finished once for each start"
        total = self.end(self.added)
        self.added = None
        return total

    @abc.abstractmethod
    def begin(self, added: Tensor) -> None:
        """Send what does not depend on other ranks."""

    @abc.abstractmethod
    def end(self, added: Tensor) -> Tensor:
        """Receive the rest and compute the result; keep no reference to received tensors."""

    def after(self, direction: Direction, state: Tensor, added: Tensor) -> Tensor:
        """Some rows of the state after this rank's tokens, from those before them."""
        decayed = self.decay.of_rows(direction.rows).applied(state, backward=self.backward)
        return masked(decayed, self.keep[self.ranks.rank, direction.rows]) + added[direction.rows]


class GatherPassing(StatePassing):
    """One all-gather; gradients reuse the decays that were gathered with the states."""

    in_flight: PendingGather | None = None
    decays: list[Decay] | None = None

    def begin(self, added: Tensor) -> None:
        """Start the all-gather; it includes decays in the forward pass."""
        sums = None if self.decays is not None else self.decay.sums
        self.in_flight = self.ranks.gather(packed(added, sums), self.what)

    def end(self, added: Tensor) -> Tensor:
        """Go over the ranks before this one."""
        assert self.in_flight is not None, "the gather was started"
        received = [unpacked(x, added, self.decay.sums) for x in self.in_flight.wait()]
        self.in_flight = None
        if self.decays is None:
            # Copies: views would keep the gathered states alive until the backward pass.
            clones = [None if sums is None else sums.clone() for _, sums in received]
            self.decays = [self.decay.of(sums) for sums in clones]
        return self.run([state for state, _ in received], self.decays)

    def run(self, added: list[Tensor], decays: list[Decay]) -> Tensor:
        """Apply the recurrence over the ranks before this one, in order."""
        total = torch.zeros_like(added[0])
        # O(ranks) small operations, all local: the states of all ranks are here already.
        for rows, behind, _ in self.directions:
            for rank in behind:
                decayed = decays[rank].of_rows(rows).applied(total[rows], backward=self.backward)
                total[rows] = masked(decayed, self.keep[rank, rows]) + added[rank][rows]
        return total


class RingPassing(StatePassing):
    """Each rank waits for the one before it and sends to the one after it."""

    def begin(self, added: Tensor) -> None:
        """Post the receives, and send where no rank comes before this one."""
        self.coming: list[tuple[Direction, PendingTransfer | None]] = []
        self.going: list[PendingTransfer] = []
        # Shortest wait first, so that one direction never blocks the other.
        for direction in sorted(self.directions, key=lambda direction: len(direction.behind)):
            passing = None
            if direction.behind:
                # Posted early, so that the sender need not wait for this rank.
                passing = self.ranks.receive(
                    real(added[direction.rows]), direction.behind[-1], self.tag
                )
            elif direction.ahead:
                self.send(direction, added[direction.rows])
            self.coming.append((direction, passing))

    def end(self, added: Tensor) -> Tensor:
        """Pass each state on as soon as it arrives."""
        total = torch.zeros_like(added)
        for direction, passing in self.coming:
            if passing is None:
                continue
            total[direction.rows] = like(passing.wait(), added[direction.rows])
            if direction.ahead:
                self.send(direction, self.after(direction, total[direction.rows], added))
        for passing in self.going:
            passing.wait()
        self.coming, self.going = [], []
        return total

    def send(self, direction: Direction, state: Tensor) -> None:
        """Send a state to the next rank."""
        self.going.append(self.ranks.send(real(state), direction.ahead[0], self.tag, self.what))


class DoublingPassing(StatePassing):
    """Recursive doubling: in round d = 1, 2, 4, ... rank r receives from rank r - d.

    Before a round a rank holds the summary of the d - 1 ranks just before it; it sends that summary
    combined with its own.
    """

    def begin(self, added: Tensor) -> None:
        """Start the first round."""
        self.totals = [torch.zeros_like(added[direction.rows]) for direction in self.directions]
        own = [self.decay.of_rows(direction.rows).sums for direction in self.directions]
        self.sums = [None if sums is None else torch.zeros_like(sums) for sums in own]
        self.round(1, added)

    def end(self, added: Tensor) -> Tensor:
        """Go through the rounds."""
        distance = 1
        while distance < self.ranks.size:
            self.receive(distance)
            distance *= 2
            if distance < self.ranks.size:
                self.round(distance, added)
        total = torch.zeros_like(added)
        for direction, known in zip(self.directions, self.totals, strict=True):
            total[direction.rows] = known
        self.totals, self.sums = [], []
        return total

    def round(self, distance: int, added: Tensor) -> None:
        """Send to the rank `distance` after this one, and receive from the one as far before it."""
        self.coming: list[PendingTransfer | None] = []
        self.going: list[PendingTransfer] = []
        for direction, total, sums in zip(self.directions, self.totals, self.sums, strict=True):
            own = self.decay.of_rows(direction.rows).sums
            # Log decays add up: the message decays over this rank and those before it.
            joined = None if sums is None or own is None else own + sums
            message = packed(self.after(direction, total, added), joined)
            asked = None
            if len(direction.behind) >= distance:
                asked = self.ranks.receive(message, direction.behind[-distance], self.tag)
            self.coming.append(asked)
            if len(direction.ahead) >= distance:
                to = direction.ahead[distance - 1]
                self.going.append(self.ranks.send(message, to, self.tag, self.what))

    def receive(self, distance: int) -> None:
        """Combine the received summary of far ranks with the known one of the near ranks."""
        for i, (direction, passing) in enumerate(zip(self.directions, self.coming, strict=True)):
            if passing is None:
                continue
            total, sums = self.totals[i], self.sums[i]
            state, received = unpacked(passing.wait(), total, sums)
            # The received state is decayed over the ranks between the sender and this one.
            nearest = direction.behind[len(direction.behind) - distance + 1 :]
            keep = self.keep[nearest, direction.rows].all(dim=0)
            passed_on = self.decay.of(sums).applied(state, backward=self.backward)
            self.totals[i] = masked(passed_on, keep) + total
            self.sums[i] = None if sums is None or received is None else sums + received
        for passing in self.going:
            passing.wait()


STATE_PASSINGS: dict[Scheme, type[StatePassing]] = {
    Scheme.GATHER: GatherPassing,
    Scheme.RING: RingPassing,
    Scheme.DOUBLING: DoublingPassing,
}


def masked(x: Shaped[Tensor, "B *rest"], keep: Bool[Tensor, "B"]) -> Shaped[Tensor, "B *rest"]:
    """Zero the rows that are not kept."""
    return x.masked_fill(~keep.view(-1, *[1] * (x.ndim - 1)), 0.0)


def real(x: Tensor) -> Tensor:
    """A complex tensor as real and imaginary parts in a last dimension; a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def like(numbers: Tensor, pattern: Tensor) -> Tensor:
    """Undo `real`: view numbers in the shape and type of `pattern`."""
    if pattern.is_complex():
        return torch.view_as_complex(numbers.view(*pattern.shape, 2))
    return numbers.view(pattern.shape)


def packed(state: Tensor, sums: Tensor | None) -> Float[Tensor, "numbers"]:
    """Flatten a state and summed decays into one message, in the state's precision."""
    parts = [real(state)] if sums is None else [real(state), sums]
    return torch.cat([x.to(parts[0].dtype).reshape(-1) for x in parts])


def unpacked(
    numbers: Float[Tensor, "numbers"], state: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The state of a message, and its summed decays if it has any."""
    size = real(state).numel()
    # In the backward pass a gather sends no decays.
    if sums is None or len(numbers) == size:
        return like(numbers[:size], state), None
    return like(numbers[:size], state), numbers[size:].view(sums.shape)
