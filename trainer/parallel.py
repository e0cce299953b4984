"""Process groups: data x sequence ranks, and the sums that all ranks need of each other.

Consecutive ranks hold the parts of the same sequences, so that they are near each other: with R
shards, rank r holds part r % R of the sequences of data rank r // R.
"""

import datetime
import functools
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a collective waits for a missing rank."""


class SoloGroup:
    """The group of a run with a single process."""

    rank = 0
    ranks = 1

    def gather(self, value: T) -> list[T]:
        """The value, as the only one."""
        return [value]


class DistributedGroup:
    """All ranks of a torch process group.

    Hand in a gloo group made for nothing else, with a longer timeout than the group that trains:
    a rank whose write failed waits in it while its peers may still be inside a collective of the
    other.
    """

    def __init__(self, group: dist.ProcessGroup | int) -> None:
        assert isinstance(group, dist.ProcessGroup), "this process is not in the group"
        self._group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank."""
        values = [value] * self.ranks
        dist.all_gather_object(values, value, group=self._group)
        return values


RankGroup = SoloGroup | DistributedGroup


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number.
        ranks: processes in all.
        local_rank: its number on this machine.
        shards: consecutive ranks that hold the parts of the same sequences.
        sequence: those of this rank's sequences; None where each rank holds whole ones.
    """

    rank: int
    ranks: int
    local_rank: int
    shards: int = 1
    sequence: dist.ProcessGroup | None = None

    @property
    def shard(self) -> int:
        """Which part of its sequences this rank holds."""
        return self.rank % self.shards

    @property
    def data_rank(self) -> int:
        """Which share of a global batch this rank's sequences are."""
        return self.rank // self.shards

    @property
    def data_ranks(self) -> int:
        """Shares of a global batch."""
        return self.ranks // self.shards

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The values of the first rank of this one's sequence group; shape and dtype are kept."""
        if self.sequence is None:
            return values
        buffer = values.to(_collective_device())
        dist.broadcast(buffer, group=self.sequence, group_src=0)
        return buffer.to(values.device)

    def sum_floats(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        return self._sum(torch.tensor(values, dtype=torch.float64))

    def sum_integers(self, values: list[int]) -> list[int]:
        """Sums over all ranks, modulo 2^64, as numbers from 0."""
        signed = [(v & 0xFFFFFFFFFFFFFFFF) - ((v & 0x8000000000000000) << 1) for v in values]
        totals = self._sum(torch.tensor(signed, dtype=torch.int64))
        return [int(total) & 0xFFFFFFFFFFFFFFFF for total in totals]

    def group(self) -> RankGroup:
        """A group of the same processes for the checkpoint protocol alone; all ranks call it."""
        if self.ranks == 1:
            return SoloGroup()
        group = dist.new_group(backend="gloo", timeout=2 * TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return DistributedGroup(group)

    def _sum(self, values: torch.Tensor) -> list:
        if self.ranks > 1:
            values = values.to(_collective_device())
            dist.all_reduce(values)
        return values.tolist()


def join_ranks(device: str, expected: int, shards: int = 1) -> Ranks:
    """Find the other processes of this run through the environment that the launcher set.

    A process without one is a run of its own and opens no port.

    Args:
        device: `cuda` or `cpu`.
        expected: processes of the run.
        shards: ranks that share each sequence, a divisor of `expected`.

    Raises:
        RuntimeError: the launcher started another number of processes than the run expects.
    """
    rank = int(os.environ.get("RANK", "0"))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if ranks != expected:
        raise RuntimeError(
            f"execution.ranks is {expected}, but {ranks} processes were started; "
            "start the run through launch/train.py or launch/sweep.py"
        )
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        store = HashStore() if ranks == 1 else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    sequence = _sequence_group(shards) if shards > 1 else None
    return Ranks(rank, ranks, local_rank, shards, sequence)


@functools.cache
def _sequence_group(shards: int) -> dist.ProcessGroup:
    """This rank's sequence group; every rank makes all of them, once a process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    members = [list(range(first, first + shards)) for first in range(0, ranks, shards)]
    groups = [dist.new_group(each, timeout=TIMEOUT) for each in members]
    mine = groups[rank // shards]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _collective_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
