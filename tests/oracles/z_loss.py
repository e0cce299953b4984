"""Cross-entropy with z-loss (Chowdhery et al. 2022, section 5) in float64, and its gradient."""

import numpy as np


def objective(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weight: float, ignored: int
) -> tuple[float, np.ndarray]:
    """The sum over the targets, and its gradient by the hidden states.

    Args:
        hidden: (tokens, width).
        head: (vocabulary, width).
        targets: (tokens,).
        weight: of log^2 Z.
        ignored: the target that counts nothing.
    """
    total, gradient = 0.0, np.zeros_like(hidden)
    for t, target in enumerate(targets):
        if target == ignored:
            continue
        exponentials = np.exp(head @ hidden[t])
        z = exponentials.sum()
        total += np.log(z) - head[target] @ hidden[t] + weight * np.log(z) ** 2
        by_logit = exponentials / z * (1 + 2 * weight * np.log(z))
        by_logit[target] -= 1
        gradient[t] = by_logit @ head
    return total, gradient
