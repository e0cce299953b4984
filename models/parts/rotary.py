"""Rotary position embeddings: tables of angles, and turning pairs of channels by them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.rowwise.rotary import turn_halves


class Rotation(NamedTuple):
    """Cosines and sines that `rotate` multiplies by, one head's width each."""

    cos: Float[Tensor, "B L 1 P"]
    sin: Float[Tensor, "B L 1 P"]


def rotation(positions: Int[Tensor, "B L"], head_dim: int, theta: float) -> Rotation:
    """The angles of rotary embeddings, in float32 (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(exponents * (-math.log(theta) / head_dim))
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "B L H P"], by: Rotation) -> Float[Tensor, "B L H P"]:
    """Turn each pair of channels (p, p + P/2) by its angle."""
    return turn_halves(x, by.cos, by.sin).to(x.dtype)
