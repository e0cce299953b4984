"""Rotary position embeddings (Su et al. 2021): tables of angles, and their application."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.rowwise.rotary import rotate_halves
from models.sequences.whole import WholeSequence


class Rotation(NamedTuple):
    """The cosine and sine of each channel's angle, as wide as a head."""

    cos: Float[Tensor, "B L 1 P"]
    sin: Float[Tensor, "B L 1 P"]


def rotation_of(sequence: WholeSequence, head_dim: int, theta: float) -> Rotation:
    """The rotation of each token by its position in its document; all layers share one table."""

    def make() -> Tensor:
        return torch.stack(rotation(sequence.positions(), head_dim, theta))

    cos, sin = sequence.memo(("rotation", head_dim, theta), make)
    return Rotation(cos, sin)


def rotation(positions: Int[Tensor, "B L"], head_dim: int, theta: float) -> Rotation:
    """The rotation of tokens at given positions, in float32 (Su et al. 2021, section 3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(exponents * (-math.log(theta) / head_dim))
    angles = positions[..., None].float() * frequencies
    # Both halves of a head share their angles: channel p is paired with p + P/2.
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "B L H P"], by: Rotation) -> Float[Tensor, "B L H P"]:
    """Rotate each pair of channels (p, p + P/2) by its angle."""
    return rotate_halves(x, by.cos, by.sin).to(x.dtype)
