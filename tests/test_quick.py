"""`make quick` runs the tests of what changed, the nearest first."""

from tests.groups import ROOT
from tests.quick import OUTSIDE, SMOKE, concerned


def test_a_changed_file_calls_for_its_mirror_then_for_what_imports_it() -> None:
    found = concerned(["analysis/laws/law.py"])
    assert found[0].startswith("tests/analysis/laws/test_")
    assert "tests/analysis/laws/test_law.py" in found
    assert any(not test.startswith("tests/analysis/laws/") for test in found)
    assert len(found) == len(set(found))


def test_a_mixer_that_only_the_registry_imports_is_tested_with_all_of_them() -> None:
    found = concerned(["models/mixers/recurrent/mamba2.py"])
    assert found[0] == "tests/models/test_mamba2.py"
    assert "tests/models/test_mixers.py" in found


def test_a_helper_of_tests_calls_for_the_tests_that_use_it() -> None:
    assert "tests/trainer/test_sequence_parallel.py" in concerned(["tests/trainer/ranks.py"])


def test_a_changed_test_calls_for_itself_alone() -> None:
    assert concerned(["tests/sweeps/test_ladder.py"]) == ["tests/sweeps/test_ladder.py"]


def test_files_of_no_package_call_for_the_tests_that_read_them() -> None:
    assert concerned(["README.md", "LICENSE"]) == ["tests/test_readme.py"]


def test_the_tests_that_are_named_exist() -> None:
    for path in (*OUTSIDE, *OUTSIDE.values(), *SMOKE):
        assert (ROOT / path.partition("::")[0]).exists(), path
