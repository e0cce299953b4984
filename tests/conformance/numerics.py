"""Shapes, dtypes, lengths, and the mixer as a linear map with the right gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.derivatives import plain_torch
from models.mixer import Mixer
from models.sequences.whole import WholeSequence
from tests.conformance.case import (
    CAUSAL,
    EVERY,
    ONE,
    ROWS,
    Batch,
    Case,
    Rows,
    assert_close,
    assert_close_gradients,
    dtype_of,
    gradients,
    leaves_of,
    run,
)
from tests.conformance.causality import materialized, projected
from tests.conformance.property import states
from tests.conformance.streaming import stream

SMALL_ROWS: Rows = ((6, 1, 5), (12,))
UNEVEN: Rows = ((64,), (19, 45))
STEP = 1e-5
FLOAT32, BFLOAT16 = 2e-6, 0.02
"""How far outputs may be from those of the next wider dtype, relative to the norm."""


@states(EVERY)
def float32(case: Case) -> None:
    """Outputs in float32 have the tokens' shape and dtype, and are finite."""
    batch = case.batch()
    outputs = run(case.mixer, batch)
    assert outputs.shape == batch.x.shape
    assert outputs.dtype == torch.float32, f"the outputs are {outputs.dtype}"
    assert outputs.isfinite().all()


@states(EVERY)
def float64(case: Case) -> None:
    """Nothing falls below float64 there, and float32 agrees, gradients included."""
    for tried, rows in case.sizes(ROWS):
        batch = tried.batch(rows)
        outputs = run(tried.wide, batch)
        assert outputs.dtype == torch.float64, f"the outputs are {outputs.dtype}"
        assert_close(run(tried.mixer, batch), outputs, FLOAT32, "outputs in float32")
        expected = gradients(tried.wide, batch)
        assert_close_gradients(gradients(tried.mixer, batch), expected, "in float32")


@states(EVERY)
def bfloat16(case: Case) -> None:
    """Under autocast to bfloat16 a residual keeps its dtype, and outputs are near float32's.

    Four tokens of five must be: a mixer that chooses among tokens may choose others by rounding.
    """
    batch = case.batch(UNEVEN)
    expected = run(case.mixer, batch)
    for residual in (torch.float32, torch.bfloat16):
        there = batch.to(residual)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sequence = WholeSequence(there.documents)
            outputs = case.mixer(there.x, sequence, there.memory())
        dtype = (there.x + outputs).dtype
        assert dtype == residual, f"a residual of {residual} becomes {dtype}"
        _assert_mostly_near(outputs, expected, f"outputs for a residual of {residual}")
    for rows in (ROWS, ONE, ((9, 1, 7), (11,))):
        for residual in (torch.float32, torch.bfloat16):
            there = case.batch(rows).to(residual)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = case.mixer(there.x, WholeSequence(there.documents), there.memory())
            what = f"outputs of {rows} for a residual of {residual}"
            assert outputs[there.real].isfinite().all(), f"{what}: not finite"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, gradient in gradients(case.mixer, batch).items():
            assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        if case.pattern in CAUSAL:
            outputs, _ = stream(case.mixer, batch, (13, 1, 50))
            _assert_mostly_near(outputs, expected, "outputs in pieces")


@states(EVERY)
def lengths(case: Case) -> None:
    """Documents of 1, 2, 3, 31 and 64 tokens have finite outputs and gradients."""
    for n in (1, 2, 3, 31, 64):
        _assert_finite(case, n)


@states(EVERY, fixed_length=True)
def long_documents(case: Case) -> None:
    """Documents of 65 and 200 tokens have finite outputs and gradients."""
    for n in (65, 200):
        _assert_finite(case, n)


@states(EVERY)
def matrix(case: Case) -> None:
    """Mixing is applying the matrix that `materialize` gives, to values of any width."""
    for mixer, tolerance in ((case.mixer, 1e-5), (case.wide, 1e-12)):
        batch = case.batch()
        values, coefficients, sequence = projected(mixer, batch)
        B, S, G, P = values.shape
        by_head = materialized(mixer, batch)
        assert by_head.shape[0] == B
        assert by_head.shape[2:] == (batch.x.shape[1], S)
        for width in (P, P + 3):
            other = torch.randn(
                B, S, G, width, generator=torch.Generator().manual_seed(3), dtype=values.dtype
            )
            mixed = mixer.mix(other, coefficients, sequence)
            H = mixed.shape[2]
            assert H % G == 0, f"{H} heads are no multiple of the {G} of the values"
            heads = other.repeat_interleave(H // G, dim=2)
            expected = torch.einsum("bhls,bshp->blhp", by_head.double(), heads.double())
            assert_close(mixed, expected, tolerance, f"values of width {width}")


@states(EVERY)
def derivatives(case: Case) -> None:
    """Derivatives along random directions are those of central differences in float64."""
    batch = case.batch(SMALL_ROWS).to(torch.float64)
    mixer = case.fresh().double()
    found = gradients(mixer, batch)
    leaves = batch.leaves() | {name: p.detach() for name, p in mixer.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    floor = max(gradient.norm().item() for gradient in found.values())
    for name, leaf in leaves.items():
        way = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        expected = _central_difference(lambda: _loss(mixer, batch), leaf, way)
        derivative = (found[name] * way).sum().item()
        scale = max(found[name].norm().item(), 1e-3 * floor)
        error = abs(derivative - expected)
        assert error <= 1e-6 * scale, f"along {name}: off by {error:.2e} of {scale:.2e}"


@states(EVERY)
def second_derivatives(case: Case) -> None:
    """Hessian-vector products in plain torch are right; the kernels give the same or refuse."""
    batch, mixer = case.batch(SMALL_ROWS).to(torch.float64), case.fresh().double()
    with plain_torch():
        ways = _ways(mixer, batch)
        found = _hessian_product(mixer, batch, ways)
        expected = _differences_of_gradients(mixer, batch, ways)
        floor = max(each.norm().item() for each in expected.values())
        for name, product in expected.items():
            scale = max(product.norm().item(), 1e-3 * floor)
            error = (found[name] - product).norm().item()
            assert error <= 1e-6 * scale, f"along {name}: off by {error:.2e} of {scale:.2e}"
    for tried, rows in case.sizes(ROWS):
        batch = tried.batch(rows)
        ways = _ways(tried.wide, batch.to(torch.float64))
        with plain_torch():
            expected = _hessian_product(tried.wide, batch, ways)
            plain = _hessian_product(tried.mixer, batch, ways)
        assert_close_gradients(plain, expected, "products in float32, in plain torch")
        for each in (tried.mixer, tried.wide):
            products = _hessian_product_unless_refused(each, batch, ways)
            if products is not None:
                assert_close_gradients(products, expected, f"products in {dtype_of(each)}")


@states(EVERY)
def determinism(case: Case) -> None:
    """Two calls give the same outputs and gradients, bit for bit."""
    batch = case.batch()
    assert torch.equal(run(case.mixer, batch), run(case.mixer, batch)), "outputs differ"
    first, second = gradients(case.mixer, batch), gradients(case.mixer, batch)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), f"gradients of {name} differ"


def _assert_mostly_near(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.isfinite().all(), f"{what}: not finite"
    sizes = expected.norm(dim=2)
    errors = (actual.float() - expected).norm(dim=2) / sizes.clamp(min=0.01 * sizes.mean().item())
    most = errors.quantile(0.8).item()
    assert most < BFLOAT16, f"{what}: four tokens of five are off by up to {most:.1e}"


def _assert_finite(case: Case, n: int) -> None:
    batch = case.batch(((n,),))
    assert run(case.mixer, batch).isfinite().all(), f"outputs of {n} tokens"
    for name, gradient in gradients(case.mixer, batch).items():
        assert gradient.isfinite().all(), f"gradient of {name} over {n} tokens"


def _ways(mixer: Mixer, batch: Batch) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        for name, leaf in leaves_of(mixer, batch).items()
    }


def _hessian_product(mixer: Mixer, batch: Batch, ways: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Hessian of the sum of squares of all real outputs times a vector, by name."""
    batch = batch.to(dtype_of(mixer)).following()
    leaves = leaves_of(mixer, batch)
    loss = run(mixer, batch)[batch.real].square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    pairs = zip(first, ways.values(), strict=True)
    along = sum((g * way.to(g)).sum() for g, way in pairs if g is not None)
    assert isinstance(along, Tensor)
    found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if product is None else product
        for (name, leaf), product in zip(leaves.items(), found, strict=True)
    }


def _hessian_product_unless_refused(
    mixer: Mixer, batch: Batch, ways: dict[str, Tensor]
) -> dict[str, Tensor] | None:
    try:
        return _hessian_product(mixer, batch, ways)
    except RuntimeError as error:
        # The second is what torch says of its own fused attention.
        if "plain_torch()" in str(error) or "derivative for aten::" in str(error):
            return None
        raise


def _differences_of_gradients(
    mixer: Mixer, batch: Batch, ways: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What `_hessian_product` gives, by Richardson's extrapolation of central differences."""
    leaves = {name: leaf.detach() for name, leaf in leaves_of(mixer, batch).items()}
    starts = {name: leaf.clone() for name, leaf in leaves.items()}
    slopes = []
    for step in (STEP, 2 * STEP):
        ends = []
        for moved in (step, -step):
            for name, leaf in leaves.items():
                leaf.copy_(starts[name] + moved * ways[name])
            ends.append(gradients(mixer, batch))
        slopes.append({name: (ends[0][name] - ends[1][name]) / (2 * step) for name in leaves})
    for name, leaf in leaves.items():
        leaf.copy_(starts[name])
    return {name: (4 * slopes[0][name] - slopes[1][name]) / 3 for name in leaves}


@torch.no_grad()
def _central_difference(loss: Callable[[], float], leaf: Tensor, way: Tensor) -> float:
    """Richardson's extrapolation of two central differences: off by the step's fourth power."""
    start, slopes = leaf.clone(), []
    for step in (STEP, 2 * STEP):
        ends = []
        for sign in (1, -1):
            leaf.copy_(start + sign * step * way)
            ends.append(loss())
        slopes.append((ends[0] - ends[1]) / (2 * step))
    leaf.copy_(start)
    return (4 * slopes[0] - slopes[1]) / 3


def _loss(mixer: Mixer, batch: Batch) -> float:
    return run(mixer, batch)[batch.real].square().sum().item()
