"""Process groups: which rank this is, and the sums that all ranks need of each other."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from trainer.checkpoint import DistributedGroup, RankGroup, SoloGroup

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a collective waits for a rank that does not come."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number.
        ranks: processes in all.
        local_rank: its number on this machine.
    """

    rank: int
    ranks: int
    local_rank: int

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
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            values = values.to(device)
            dist.all_reduce(values)
        return values.tolist()


def join_ranks(device: str, expected: int) -> Ranks:
    """Find the other processes of this run through the environment that the launcher set.

    A process without one is a run of its own and opens no port.

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
    return Ranks(rank, ranks, local_rank)
