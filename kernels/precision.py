"""Keeping computations in float32 or wider under torch.autocast."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable torch.autocast on the device of `x`."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if wider: for decays, states and statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
