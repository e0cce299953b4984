"""Floors of a folder, on graphs small enough to see."""

from tests.floors import arrange


def test_an_entry_stands_one_floor_above_the_highest_that_it_imports():
    edges = {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset({"a", "b"}), "d": frozenset()}
    found = arrange("x", edges)
    assert found.floors == (("a", "d"), ("b",), ("c",))
    assert (found.imports, found.circles) == (3, ())


def test_a_circle_is_named_and_shares_a_floor():
    edges = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"a", "d"})}
    found = arrange("x", {**edges, "d": frozenset(), "e": frozenset({"b"})})
    assert found.floors == (("d",), ("a", "b", "c"), ("e",))
    assert found.circles == (("a", "b", "c"),)
