"""Every registered mixer, in every pattern it declares, has every property it can have."""

import pytest

from tests.conformance.case import case_of, declared_cases
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
