"""Point-to-point and collective communication in a process group, with a record of sent bytes."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


class Sent(NamedTuple):
    """One communication call of this rank: how many bytes it sent to which ranks.

    Attributes:
        to: the receivers, in order; each got an equal part.
    """

    what: str
    bytes: int
    to: tuple[int, ...]


class Communicator:
    """The ranks of a group, in order, and a record of what this one sent.

    Attributes:
        rank: this process's rank in the group.
        size: number of ranks.
        sent: all calls so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: list[Sent] = []
        self._tags = itertools.count()

    def tag(self) -> int:
        """The next message tag. Ranks that make the same calls get the same tags."""
        return next(self._tags)

    def gather(self, x: Shaped[Tensor, "*shape"], what: str) -> "PendingGather":
        """Start an all-gather; shapes and dtypes must be equal on all ranks."""
        x = x.contiguous()
        everyones = [torch.empty_like(x) for _ in range(self.size)]
        work = dist.all_gather(everyones, x, group=self.group, async_op=True)
        assert work is not None, "this rank is in the group"
        others = tuple(r for r in range(self.size) if r != self.rank)
        # Counted as if sent to each other rank directly, whatever algorithm the backend uses.
        self.sent.append(Sent(what, len(others) * x.numel() * x.element_size(), others))
        return PendingGather(everyones, work)

    def exchange(self, pieces: list[Tensor], shapes: list[torch.Size], what: str) -> list[Tensor]:
        """All-to-all: send one tensor to each rank; return those received, of the given shapes."""
        outgoing = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [shape.numel() for shape in shapes]
        incoming = outgoing.new_empty(sum(sizes))
        counts = [piece.numel() for piece in pieces]
        # Flat buffers: slices of different shapes in one call.
        dist.all_to_all_single(incoming, outgoing, sizes, counts, group=self.group)
        others = tuple(r for r, count in enumerate(counts) if count and r != self.rank)
        sent = sum(counts[r] for r in others) * outgoing.element_size()
        self.sent.append(Sent(what, sent, others))
        return [x.view(s) for x, s in zip(incoming.split(sizes), shapes, strict=True)]

    def send(self, x: Shaped[Tensor, "*shape"], to: int, tag: int, what: str) -> "PendingTransfer":
        """Start sending a tensor to another rank, which must call `receive` with the same tag."""
        x = x.contiguous()
        self.sent.append(Sent(what, x.numel() * x.element_size(), (to,)))
        return self._pass(dist.isend, x, to, tag)

    def receive(self, like: Shaped[Tensor, "*shape"], sender: int, tag: int) -> "PendingTransfer":
        """Start receiving a tensor of this shape and dtype from another rank."""
        return self._pass(dist.irecv, like.new_empty(like.shape), sender, tag)

    def _pass(
        self, action: Callable[..., dist.Work | None], x: Tensor, other: int, tag: int
    ) -> "PendingTransfer":
        # A batch of one: NCCL completes a batch as a whole, so a state to be passed on would wait
        # for one of the opposite direction.
        operation = dist.P2POp(action, x, group=self.group, tag=tag, group_peer=other)
        (work,) = dist.batch_isend_irecv([operation])
        return PendingTransfer(x, work)


class PendingGather(NamedTuple):
    """An all-gather in flight."""

    everyones: list[Tensor]
    work: dist.Work

    def wait(self) -> list[Tensor]:
        """The tensor of each rank."""
        self.work.wait()
        return self.everyones


class PendingTransfer(NamedTuple):
    """A send or receive in flight; holds the tensor, which must stay alive until it is done."""

    x: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor."""
        self.work.wait()
        return self.x
