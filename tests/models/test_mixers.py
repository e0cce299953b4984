"""Every registered mixer, in every pattern it declares, has every property it can have."""

import pytest
import torch

from models.sequences.whole import WholeSequence
from tests.conformance.case import case_of, declared_cases, gradients
from tests.conformance.property import Property, Reason
from tests.conformance.suite import PROPERTIES

CHECKS = [
    pytest.param(kind, pattern, each, id=f"{kind}-{pattern.value}-{each.name}")
    for kind, pattern in declared_cases()
    for each in PROPERTIES
    if pattern in each.patterns
]


@pytest.mark.parametrize(("kind", "pattern", "each"), CHECKS)
def test_every_mixer_has_every_property_it_declares(kind, pattern, each: Property) -> None:
    case = case_of(kind, pattern)
    reason = each.excuse(case)
    if reason is not None:
        assert reason is not Reason.PATTERN
        pytest.skip(reason.value)
    each.check(case)


@pytest.mark.parametrize(("kind", "pattern"), declared_cases())
def test_a_sequence_first_used_in_inference_mode_serves_training(kind, pattern) -> None:
    case = case_of(kind, pattern)
    batch = case.batch().following()
    found = []
    for first in (True, False):
        with torch.inference_mode():
            made = WholeSequence(batch.documents.clone())
            sequence = made if first else WholeSequence(batch.documents)
            memory = batch.memory()
            case.mixer(batch.x, sequence, memory)
        # The memory's features are made anew, its sequence is the one that was used.
        if memory is not None and batch.source is not None:
            memory = memory._replace(x=batch.source)
        loss = case.mixer(batch.x, sequence, memory)[batch.real].square().sum()
        found.append(torch.autograd.grad(loss, batch.x)[0])
    assert torch.equal(found[0], gradients(case.mixer, batch)["x"]), "other gradients"
    assert torch.equal(found[0], found[1]), "other gradients"
