"""The linters, and within a minute and a half the tests of what changed: what `make quick` runs.

python -m tests.quick               what differs from the main branch, or from the last commit there
python -m tests.quick --since HEAD  what is not committed

A changed file calls for the tests of its mirror folder and for every test that imports it, however
indirectly: those a step away first. Tests marked slow are left out, and those not begun in time;
both are named at the end. Where nothing changed, a few tests of each package run. `make test` runs
everything.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import PurePath

import grimp

from tests.groups import LINTERS, PYTEST, ROOT, SHAPED, SHAPES, Group
from tests.run import conclude, report, run, say

SECONDS = 75.0
"""After which no test begins; what has begun then ends."""
PACKAGES = (
    "analysis", "data_pipelines", "kernels", "launch", "models", "sweeps", "tests", "trainer",
    "untrusted",
)  # fmt: skip
SMOKE = (
    "tests/test_groups.py",
    "tests/analysis/laws",
    "tests/data_pipelines/test_config.py",
    "tests/kernels/scans/test_linear_scan.py",
    "tests/models/test_backbone.py",
    "tests/sweeps",
    "tests/trainer/test_config.py",
)
OUTSIDE = {
    "README.md": "tests/test_readme.py",
    "pyproject.toml": "tests/launch/test_imports.py",
    "requirements.lock": "tests/launch/test_imports.py",
    "Makefile": "tests/test_readme.py::test_make_targets_exist",
}
"""Tests of files that no test imports or mirrors."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.quick")
    parser.add_argument("--since", help="a commit; where main was left, or one back, if not given")
    since = parser.parse_args(words).since or base()
    begin = time.time()
    changed = changed_files(since)
    tests = concerned(changed) if changed else list(SMOKE)
    say(f"{len(changed)} files differ from {since}: {len(tests)} files of tests")
    # The longest linter first, so that all of them end beside the tests.
    linters = sorted(LINTERS, key=lambda linter: -linter.seconds)
    commands = [linters[0], *sessions(tests, begin + SECONDS), *linters[1:]]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run, group) for group in commands]
        ended = [report(each.result()) for each in as_completed(running)]
    say(f"{time.time() - begin:.0f} s; slow tests are left out, `make test` runs them")
    for each in ended:
        for line in each.output.splitlines():
            if line.startswith("not reached"):
                say(line)
    return conclude(ended)


def base() -> str:
    """Where this branch left the main one; one commit back where it has not."""
    for main_branch in ("origin/main", "main"):
        if common := git("merge-base", "HEAD", main_branch):
            if common != git("rev-parse", "HEAD"):
                return common
            break
    return "HEAD~1" if git("rev-parse", "--verify", "-q", "HEAD~1") else "HEAD"


def changed_files(since: str) -> list[str]:
    """What differs from a commit, and what git does not know yet."""
    differing = git("diff", "--name-only", "--diff-filter=d", since)
    new = git("ls-files", "--others", "--exclude-standard")
    return sorted({*differing.splitlines(), *new.splitlines()})


def concerned(changed: Iterable[str]) -> list[str]:
    """Files and folders of tests, the nearest to what changed first."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    found = [test for file in changed for test in mirrors(file)]
    level = {module_of(file) for file in changed if file.endswith(".py")} & graph.modules
    seen = set(level)
    while level:
        found += [file_of(module) for module in sorted(level) if is_test(module)]
        level = {m for each in level for m in graph.find_modules_that_directly_import(each)} - seen
        seen |= level
    return list(dict.fromkeys(found))


def mirrors(file: str) -> list[str]:
    """The test files of the folder that mirrors a file's own, or the nearest above it."""
    path = PurePath(file)
    if file in OUTSIDE:
        return [OUTSIDE[file]]
    if is_test(module_of(file)):
        return [file]
    if path.parts[0] not in PACKAGES:
        return []
    within = ROOT / (path.parent if path.parts[0] == "tests" else "tests" / path.parent)
    while not within.is_dir():
        within = within.parent
    twin = within / f"test_{path.stem}.py"
    # Tests import what helps them, but not a conftest.
    imported = path.parts[0] == "tests" and path.stem != "conftest"
    others = [] if imported else sorted(within.glob("test_*.py"))
    return [str(each.relative_to(ROOT)) for each in (twin, *others) if each.is_file()]


def sessions(tests: Sequence[str], until: float) -> list[Group]:
    """One session of pytest with shapes checked, one without, as far as there are tests."""
    shaped = [test for test in tests if test.startswith(SHAPED)]
    plain = [test for test in tests if not test.startswith(SHAPED)]
    limits = ("-m", "not slow", "-p", "tests.deadline", f"--until={until}")
    named = (("tests", (), plain), ("tests, shapes checked", (SHAPES,), shaped))
    return [
        Group(name, SECONDS, (*PYTEST, *options, *limits, *files))
        for name, options, files in named
        if files
    ]


def is_test(module: str) -> bool:
    """Whether a module holds tests."""
    return module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")


def module_of(file: str) -> str:
    """The module of a Python file."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def file_of(module: str) -> str:
    """The file of a module."""
    return module.replace(".", "/") + ".py"


def git(*words: str) -> str:
    """What git answers; nothing where it does not know."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
