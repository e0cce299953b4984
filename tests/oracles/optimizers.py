"""One step of each optimizer in float64, as its paper writes it."""

import numpy as np

Array = np.ndarray


def adamw(
    weight: Array, gradients: list[Array], rate: float, decay: float, betas: tuple, eps: float
) -> Array:
    """Loshchilov and Hutter 2019, algorithm 2, without a schedule multiplier."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        unbiased, spread = mean / (1 - betas[0] ** t), np.sqrt(square / (1 - betas[1] ** t))
        weight = weight - rate * (unbiased / (spread + eps) + decay * weight)
    return weight


def lion(weight: Array, gradients: list[Array], rate: float, decay: float, betas: tuple) -> Array:
    """Chen et al. 2023, algorithm 2."""
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        direction = np.sign(betas[0] * momentum + (1 - betas[0]) * gradient)
        weight = weight - rate * (direction + decay * weight)
        momentum = betas[1] * momentum + (1 - betas[1]) * gradient
    return weight


def muon(
    weight: Array, gradients: list[Array], rate: float, decay: float, momentum: float
) -> Array:
    """Jordan et al. 2024 with Nesterov momentum, at the update size of Liu et al. 2025, eq. 4."""
    mean = np.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        update = orthogonalized(momentum * mean + (1 - momentum) * gradient)
        size = 0.2 * np.sqrt(max(weight.shape))
        weight = weight - rate * (size * update + decay * weight)
    return weight


def orthogonalized(matrix: Array) -> Array:
    """Five iterations of the quintic polynomial on the singular values, by their decomposition."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right
