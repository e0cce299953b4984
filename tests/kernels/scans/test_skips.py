"""What D adds to the outputs of a scan: the float64 loop's, and D times the values beside it."""

import numpy as np
import pytest
import torch

from kernels.scans.selective_scan import selective_scan, selective_scan_reference
from kernels.scans.ssd import ssd, ssd_reference
from tests.kernels.agreement import assert_agrees, needs_kernel
from tests.kernels.scans import ssd_cases, test_selective_scan
from tests.oracles import selective_scan as selective_scan_oracle
from tests.oracles import ssd as ssd_oracle

KINDS = {
    "selective_scan": (test_selective_scan, selective_scan_oracle),
    "ssd": (ssd_cases, ssd_oracle),
}


def drawn(kind, length, ragged, dtype=torch.float32, batch=2, **sizes):
    """Inputs with a D, the documents, and gradients of outputs and final state."""
    module, _ = KINDS[kind]
    inputs = module.make_inputs(length, batch=batch, **sizes)
    inputs["D"] = np.random.default_rng(7).normal(size=inputs["values"].shape[2])
    tensors, exact = module.rounded(inputs, dtype)
    # As the inputs: what the dtype holds, for a bfloat16 output gets a bfloat16 gradient.
    given = [torch.tensor(x, dtype=dtype).double().numpy() for x in module.weights(exact, 9)]
    return tensors, exact, module.make_documents(ragged, batch, length), given


def differentiate(scan, tensors, documents, d_outputs, d_final):
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    result = scan(**leaves, documents=torch.from_numpy(documents))
    weighted = (result.outputs * torch.as_tensor(d_outputs)).sum()
    weighted = weighted + (result.final * torch.as_tensor(d_final)).sum()
    gradients = torch.autograd.grad(weighted, leaves.values())
    return result, dict(zip(leaves, gradients, strict=True))


def assert_adds_the_values(kind, scan, length, ragged, dtype=torch.float32, **sizes):
    tensors, exact, documents, given = drawn(kind, length, ragged, dtype, **sizes)
    oracle = KINDS[kind][1]
    own = {name: x for name, x in exact.items() if name != "D"}
    values, rest = exact["values"], tuple(range(3, exact["values"].ndim))
    rates = exact["D"].reshape(-1, *[1] * len(rest))
    outputs, _ = oracle.scan(own, documents)
    expected = oracle.gradients(own, documents, *given)
    expected["values"] = expected["values"] + rates * given[0]
    expected["D"] = (given[0] * values).sum((0, 1, *rest))
    result, gradients = differentiate(scan, tensors, documents, *given)
    assert_agrees(result.outputs, outputs + rates * values, "outputs", dtype)
    for name, gradient in expected.items():
        assert_agrees(gradients[name], gradient, "gradients", dtype)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 9, 63, 64, 65, 197])
@pytest.mark.parametrize(("kind", "scan"), [("selective_scan", selective_scan), ("ssd", ssd)])
def test_outputs_and_every_gradient_match_the_loop(kind, scan, length, ragged):
    assert_adds_the_values(kind, scan, length, ragged)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "scan"), [("selective_scan", selective_scan), ("ssd", ssd)])
def test_other_dtypes_match_the_loop(kind, scan, dtype):
    assert_adds_the_values(kind, scan, 70, True, dtype)


@pytest.mark.parametrize(
    ("kind", "scan"), [("selective_scan", selective_scan_reference), ("ssd", ssd_reference)]
)
def test_references_match_the_loop(kind, scan):
    assert_adds_the_values(kind, scan, 20, True, torch.float64)


@pytest.mark.parametrize(
    ("kind", "scan", "sizes"),
    [
        ("selective_scan", selective_scan, {"channels": 130, "states": 3}),
        ("ssd", ssd, {"heads": 12, "width": 60, "groups": 2}),
    ],
)
def test_channels_of_several_tasks_match_the_loop(kind, scan, sizes):
    assert_adds_the_values(kind, scan, 70, True, **sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_gives_the_outputs_of_training(kind):
    tensors, _, documents, _ = drawn(kind, 70, True)
    scan = {"selective_scan": selective_scan, "ssd": ssd}[kind]
    with torch.no_grad():
        quiet = scan(**tensors, documents=torch.from_numpy(documents))
    loud = scan(
        **{name: x.requires_grad_() for name, x in tensors.items()},
        documents=torch.from_numpy(documents),
    )
    assert torch.equal(quiet.outputs, loud.outputs)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_operators_promise_the_shapes_that_they_return(kind):
    tensors, _, _, _ = drawn(kind, 9, False)
    D, *rest = tensors.pop("D"), *tensors.values(), None
    forward, backward = (
        getattr(torch.ops.crossladder, f"{kind}_{way}") for way in ("forward", "backward")
    )
    chunk = [4] if kind == "selective_scan" else []
    torch.library.opcheck(forward, (*rest, *chunk, D), test_utils="test_faketensor")
    outputs, final, *kept = forward(*rest, *chunk, D)
    inputs = [*rest[:5], None, *kept] if kept else rest
    arguments = (outputs, final, *inputs, *chunk, D)
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(("kind", "scan"), [("selective_scan", selective_scan), ("ssd", ssd)])
def test_factors_of_another_width_are_refused(kind, scan):
    tensors, _, _, _ = drawn(kind, 9, False)
    with pytest.raises((ValueError, TypeError)):
        scan(**{**tensors, "D": tensors["D"][:-1]})
