"""What D adds beside the Triton kernels, which leave it to torch."""

import pytest
import torch

from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from tests.kernels.test_skips import assert_adds_the_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "scan", "sizes"),
    [
        ("selective_scan", selective_scan, {"channels": 3, "states": 2}),
        ("ssd", ssd, {"heads": 2, "groups": 1}),
    ],
)
def test_outputs_and_every_gradient_match_the_loop(kind, scan, sizes, dtype):
    assert_adds_the_values(kind, scan, 65, True, dtype, **sizes)
