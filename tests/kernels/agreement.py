"""How far a kernel may be from its oracle, and the comparison that all kernel tests use."""

import numpy as np
import pytest
import torch

from kernels.dispatch import Path, path_of

needs_kernel = pytest.mark.skipif(
    path_of(torch.zeros(1)) is not Path.NATIVE, reason="no C++ compiler and ninja here"
)

# Root mean square of the difference over that of the expected; the largest single difference may
# be twenty times that share of the expected's root mean square.
TOLERANCES = {
    ("outputs", torch.float64): 1e-12,
    ("gradients", torch.float64): 1e-11,
    ("outputs", torch.float32): 1e-5,
    ("gradients", torch.float32): 1e-4,
    ("outputs", torch.bfloat16): 5e-3,
    ("gradients", torch.bfloat16): 5e-3,
}


def assert_agrees(actual, expected, kind, dtype=torch.float32):
    actual = actual.detach().double().numpy()
    expected = expected.detach().double().numpy() if torch.is_tensor(expected) else expected
    assert actual.shape == expected.shape
    if actual.size == 0:
        return
    assert np.isfinite(actual).all()
    scale = np.sqrt(np.mean(expected**2))
    difference = np.abs(actual - expected)
    tolerance = TOLERANCES[kind, dtype]
    assert np.sqrt(np.mean(difference**2)) <= tolerance * scale
    assert difference.max() <= 20 * tolerance * scale


def ragged_documents(batch, length, generator):
    """Ids that never fall: rows start in document 0 or 1, and change at random tokens."""
    starts = generator.random((batch, length)) < 0.15
    starts[:, 0] = np.arange(batch) % 2 == 1
    return np.cumsum(starts, axis=1).astype(np.int32)
