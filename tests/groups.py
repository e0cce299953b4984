"""What `make test` runs: linters and tests in groups that need nothing of each other."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=8")
SHAPES = "--jaxtyping-packages=models,kernels,beartype.beartype"
"""Checks the shapes of everything that models and kernels are handed."""
SHAPED = ("tests/models", "tests/kernels")
OVER_RANKS = "tests/trainer/test_sequence_parallel.py"
TRITON = "tests/benchmarks/kernels"
"""Compiles Triton's source, which the shape checks would rewrite."""


@dataclass(frozen=True)
class Group:
    """A process of its own.

    Attributes:
        seconds: that it takes on one core, roughly; the longest start first.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


def of_tests(name: str, seconds: float, *paths: str) -> Group:
    """A group of files and folders; shapes are checked where the tests are of tensors."""
    shapes = (SHAPES,) if all(path.startswith(SHAPED) for path in paths) else ()
    return Group(name, seconds, (*PYTEST, *shapes, *paths))


def tool(name: str) -> str:
    """Where a command of this environment lies."""
    return str(Path(sys.executable).parent / name)


LINTERS = (
    Group("ruff format", 1, (tool("ruff"), "format", "--no-cache", "--check", ".")),
    Group("ruff check", 1, (tool("ruff"), "check", "--no-cache", ".")),
    Group("pyright", 45, (tool("pyright"), "--pythonpath", sys.executable)),
    Group("import rules", 15, (tool("lint-imports"), "--no-cache")),
    Group("written paths", 1, (sys.executable, "-m", "tests.written_paths")),
)
TESTS = (
    of_tests("launch", 330, "tests/launch"),
    of_tests("models", 115, "tests/models"),
    of_tests("kernels", 60, "tests/kernels"),
    of_tests("kernels, compiled for GPUs", 30, TRITON),
    of_tests("trainer", 200, "tests/trainer", f"--ignore={OVER_RANKS}"),
    of_tests("trainer, over ranks", 90, OVER_RANKS),
    of_tests("cluster", 250, "tests/cluster"),
    of_tests("sequence parallelism", 110, "tests/sequence_parallel"),
    of_tests("faults", 60, "tests/faults"),
    of_tests("README", 130, "tests/test_readme.py"),
    of_tests("benchmarks of training", 125, "tests/benchmarks/training"),
    of_tests("analysis: report", 70, "tests/analysis/report"),
    of_tests("analysis: notebooks", 40, "tests/analysis/test_notebooks.py"),
    of_tests("analysis: recovery", 65, "tests/benchmarks/statistics"),
)
INTERPRETED = Group(
    "kernels, interpreted",
    205,
    (sys.executable, "-m", "tests.kernels.run", "--processes", "1"),
)


def rest() -> Group:
    """Every test that no group names, so that a new file needs no entry."""
    named = [word for group in TESTS for word in group.command if word.startswith("tests/")]
    ignored = (f"--ignore={path}" for path in named)
    return Group("everything else", 180, (*PYTEST, "tests", *ignored))


def groups() -> list[Group]:
    """All of them, the longest first."""
    return sorted((*LINTERS, *TESTS, INTERPRETED, rest()), key=lambda group: -group.seconds)
