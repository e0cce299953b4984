"""What all tests of Triton kernels share: where they run, poisoned memory, a faster interpreter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.triton_launch import interpreting

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if interpreting() or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1: python -m tests.kernels.run")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixtures_noted(request, record_property):
    """Tell the runner's table what a test was given, which its name need not say."""
    record_property("fixtures", " ".join(request.fixturenames))


@pytest.fixture(autouse=True)
def scans_by_slices(monkeypatch):
    """Combine whole slices where Triton's interpreter combines one element at a time.

    Its combinations are elementwise, so the results are the same and come fifty times sooner; one
    test compares the two.
    """
    if interpreting():
        from triton.runtime.interpreter import ScanOps

        monkeypatch.setattr(ScanOps, "generic_scan", _scan_by_slices)


def _scan_by_slices(self, inputs):
    lines = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [np.empty_like(line) for line in lines]
    carried = ()
    for i in range(len(lines[0])):
        here = tuple(
            self.to_tensor(line[i].copy(), x.dtype) for line, x in zip(lines, inputs, strict=True)
        )
        carried = self.combine_fn.fn(*carried, *here) if i else here
        carried = carried if isinstance(carried, tuple) else (carried,)
        for result, x in zip(results, carried, strict=True):
            result[i] = x.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(result, 0, self.axis)), x.dtype)
        for result, x in zip(results, inputs, strict=True)
    ]


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what torch allocates without a value, so that what a kernel does not write shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate):
    def poison(*arguments, **options):
        x = allocate(*arguments, **options)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    return poison
