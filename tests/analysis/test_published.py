"""Published tables: every listed value within its tolerance, no published optimum below ours."""

from dataclasses import replace

import pytest

from analysis.laws.catalog import CHINCHILLA
from analysis.laws.transformed import REPEAT
from tests.laws.published import (
    DATABLATIONS,
    HEADLINE,
    HOFFMANN,
    REPEATED,
    ROUNDED,
    Reference,
    chinchilla_points,
    fitted,
    kept,
    measure,
    objective,
    references,
    repeated_points,
)

LISTED = references()
published = pytest.mark.skipif(
    not LISTED, reason="the published tables are not beside the checkout"
)


@pytest.fixture(scope="module")
def ours():
    return measure()


@published
@pytest.mark.parametrize("reference", LISTED, ids=[each.id for each in LISTED])
def test_our_value_is_within_the_listed_tolerance(ours, reference):
    result = ours[reference.id]
    assert reference.holds(result), f"{result:.10g} against {reference.target:.10g}"


@published
@pytest.mark.parametrize("values", [HOFFMANN, ROUNDED, HEADLINE], ids=["exact", "round", "replica"])
def test_no_published_chinchilla_parameters_lie_below_our_optimum(values):
    rows = kept(chinchilla_points())
    assert fitted(rows, CHINCHILLA, 1e-3).objective <= objective(rows, CHINCHILLA, values, 1e-3)


@published
def test_no_published_repetition_parameters_lie_below_our_optimum():
    rows, law = repeated_points(), replace(REPEAT, fixed=tuple(DATABLATIONS.items()))
    assert fitted(rows, law, 1e-3).objective < objective(rows, law, REPEATED, 1e-3)


def test_a_reference_fails_just_outside_its_tolerance():
    relative = Reference("x", "", 200.0, 0.01, "rel", "")
    assert relative.holds(201.9)
    assert not relative.holds(197.9)
    bound = Reference("x", "", 1.0, 1e-6, "le", "")
    assert bound.holds(0.5)
    assert not bound.holds(1.1)
