"""Where torch.autocast must not lower a computation."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep torch.autocast from lowering the products of `x` that are computed inside."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is wider: for decays, states and statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
