"""Every test belongs to one group of `make test`."""

from collections import Counter

from tests.groups import ROOT, TESTS, groups, rest


def paths_of(group) -> list[str]:
    return [word for word in group.command if word.startswith("tests/")]


def test_groups_name_files_that_exist_and_none_twice() -> None:
    named = [path for group in TESTS for path in paths_of(group)]
    assert named
    for group in TESTS:
        for path in paths_of(group):
            assert (ROOT / path).exists(), path
            taken = [p for p in named if f"--ignore={p}" not in group.command]
            assert [p for p in taken if (ROOT / p).is_relative_to(ROOT / path)] == [path]


def test_the_last_group_takes_what_no_other_names() -> None:
    ignored = [word.removeprefix("--ignore=") for word in rest().command if "--ignore=" in word]
    assert sorted(ignored) == sorted(path for group in TESTS for path in paths_of(group))
    assert "tests" in rest().command


def test_the_longest_group_starts_first_and_names_are_unique() -> None:
    seconds = [group.seconds for group in groups()]
    assert seconds == sorted(seconds, reverse=True)
    assert max(Counter(group.name for group in groups()).values()) == 1
