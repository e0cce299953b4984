"""The gates of an RG-LRU against their formulas in float64, in outputs and every gradient."""

import pytest
import torch

from kernels.dispatch import Path, path_of
from kernels.scans import rglru as module
from kernels.scans.rglru import rglru

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
PATHS = [Path.NATIVE, Path.REFERENCE]


def serve_by(monkeypatch, path):
    if path is Path.REFERENCE:
        monkeypatch.setattr(module, "path_of", lambda _: path)
    else:
        assert path_of(torch.ones(1)) is path


def formulas(recurrence, inputs, rate, begins, candidate=None):
    """log_decay and write, one operation after the other; the root is not bounded."""
    r, i = 1 / (1 + torch.exp(-recurrence)), 1 / (1 + torch.exp(-inputs))
    log_decay = -rate * r
    scale = torch.sqrt(-torch.special.expm1(2 * log_decay))
    write = i * torch.where(begins[..., None], torch.ones_like(scale), scale)
    return log_decay, write if candidate is None else write * torch.tanh(candidate)


def make(dtype=torch.float32, batch=2, length=70, width=21, spread=2.0, candidate=True):
    """Leaves and marks."""
    generator = torch.Generator().manual_seed(length * 100 + width)
    maps = 3 if candidate else 2
    leaves = [spread * torch.randn(batch, length, width, generator=generator) for _ in range(maps)]
    leaves.insert(2, 0.01 + torch.rand(width, generator=generator))
    begins = torch.rand(batch, length, generator=generator) < 0.1
    return [x.to(dtype).requires_grad_() for x in leaves], begins


def differentiate(function, leaves, begins):
    recurrence, inputs, rate, *candidate = leaves
    outputs = function(recurrence, inputs, rate, begins, *candidate)
    generator = torch.Generator().manual_seed(3)
    seeds = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, seeds))


def assert_agree(leaves, begins, tolerance):
    got = differentiate(rglru, leaves, begins)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for x, wanted in zip(got, differentiate(formulas, exact, begins), strict=True):
        assert x.shape == wanted.shape
        assert (x - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("candidate", [True, False])
@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 40), (64, 16), (131, 5)])
def test_outputs_and_gradients_are_those_of_the_formulas(
    monkeypatch, path, candidate, length, width
):
    serve_by(monkeypatch, path)
    leaves, begins = make(length=length, width=width, candidate=candidate)
    assert_agree(leaves, begins, TOLERANCE[torch.float32])


def test_float64_stays_float64():
    leaves, begins = make(torch.float64)
    assert_agree(leaves, begins, TOLERANCE[torch.float64])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("small", [1e-3, 1e-5])
def test_slow_decays_and_small_candidates_lose_nothing(monkeypatch, path, small):
    serve_by(monkeypatch, path)
    # With gates half open no root is so small that its derivative is bounded.
    leaves, begins = make(spread=0.5)
    with torch.no_grad():
        leaves[2].fill_(small)
        leaves[3].mul_(small)
    assert_agree(leaves, begins, TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", PATHS)
def test_the_derivative_of_the_root_is_bounded(monkeypatch, path):
    serve_by(monkeypatch, path)
    zeros, rate = torch.zeros(1, 1, 3), torch.tensor([0.0, 1e-12, 0.25]).requires_grad_()
    _, write = rglru(zeros, zeros, rate, torch.zeros(1, 1, dtype=torch.bool))
    (slope,) = torch.autograd.grad(write.sum(), rate)
    forgotten = -torch.special.expm1(torch.tensor(-0.25))
    unbounded = 0.5 * 0.5 * (1 - forgotten) / forgotten.sqrt()
    assert torch.allclose(slope, torch.tensor([500.0, 500.0, unbounded]), rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_saturated_gates_are_what_they_tend_to(monkeypatch, path):
    serve_by(monkeypatch, path)
    ends = torch.tensor([-1e4, 1e4]).expand(1, 1, 2)
    leaves = [x.clone().requires_grad_() for x in (ends, ends, torch.ones(2), ends)]
    begins = torch.zeros(1, 1, dtype=torch.bool)
    log_decay, write, *gradients = differentiate(rglru, leaves, begins)
    assert log_decay.flatten().tolist() == pytest.approx([0.0, -1.0], abs=1e-30)
    open_write = (1 - torch.tensor(-2.0).exp()).sqrt().item()
    assert write.flatten().tolist() == pytest.approx([0.0, open_write], abs=1e-30, rel=1e-6)
    assert all(x.isfinite().all() for x in gradients)


def test_a_nan_stays_where_it_is():
    leaves, begins = make()
    clean = differentiate(rglru, leaves, begins)
    with torch.no_grad():
        for x in (leaves[0], leaves[1], leaves[3]):
            x[0, 3, 7] = torch.nan
    for x, wanted in zip(differentiate(rglru, leaves, begins), clean, strict=True):
        if x.ndim == 3:
            assert x[0, 3, 7].isnan()
            x[0, 3, 7] = wanted[0, 3, 7]
            assert torch.equal(x, wanted)


def test_the_number_of_threads_does_not_matter():
    leaves, begins = make(batch=3, length=200)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(differentiate(rglru, leaves, begins))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_bfloat16_maps_give_float32_steps():
    leaves, begins = make()
    low = [x.detach().bfloat16() for x in leaves]
    steps = rglru(low[0], low[1], low[2].float(), begins, low[3])
    recurrence, inputs, rate, candidate = (x.double() for x in low)
    exact = formulas(recurrence, inputs, rate, begins, candidate)
    assert all(x.dtype is torch.float32 for x in steps)
    assert all((x - y).norm() < 2e-6 * y.norm() for x, y in zip(steps, exact, strict=True))


def test_meta_tensors_give_shapes_forward_and_backward():
    leaves, begins = make()
    leaves = [x.detach().to("meta").requires_grad_() for x in leaves]
    recurrence, inputs, rate, candidate = leaves
    steps = rglru(recurrence, inputs, rate, begins.to("meta"), candidate)
    (steps.log_decay.sum() + steps.write.sum()).backward()
    assert all(x.shape == recurrence.shape for x in steps)
    assert all(x.grad is not None and x.grad.is_meta for x in leaves)
