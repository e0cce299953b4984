"""Every Triton kernel against its oracle, in Triton's interpreter: `python -m tests.kernels.run`.

python -m tests.kernels.run                 all, two at a time; writes reports/kernel_tests.json
python -m tests.kernels.run --processes 1   all, one after the other
python -m tests.kernels.run ssd linear_scan some; writes reports/kernel_tests_part.json

Prints a table of operators and properties, with the operators that a GPU runs as torch code, which
leave nothing to interpret. Ends with 1 if a test fails or is skipped, if nothing ran, or if an
operator leaves a property untested without a reason.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.measurements import Measurement, write_measurements

ROOT = Path(__file__).parent.parent.parent
TESTS = Path(__file__).parent / "triton"
PROCESSES = 2

PROPERTIES = {
    "oracle": r"match|equal",
    "gradients": r"gradient",
    "sizes": r"\bany_|_any_|long|many",
    "decays": r"decay|strong",
    "state": r"state",
    "documents": r"document|ragged|True",
    "isolation": r"nan_|infinity|huge",
    "nan": r"nan_|infinity",
    "bfloat16": r"bfloat16",
    "written": r"written|poisoned",
    "bitwise": r"bit_by_bit|bit_for_bit",
}
"""What is looked for in a test's name and in the names of its fixtures, by property.

"isolation" is that a document does not feel another's values, be they ever so large; "nan" that it
does not feel those that are not finite.
"""

MASKED = ("window_attention", "checkpoint_attention")
ATTENTIONS = (*MASKED, "block_sparse_attention")
SEARCH = "hip_selection"
MIXED = (
    "a product of tiles multiplies the value of a key that is not seen by 0, and 0 times NaN is "
    "NaN: what is not finite may reach another document in its tile; huge finite values do not"
)
NOT_APPLICABLE = {
    **{(op, "decays"): "attention has no decays" for op in ATTENTIONS},
    **{(op, "state"): "attention carries no state" for op in ATTENTIONS},
    (SEARCH, "decays"): "scores of keys have no decays",
    (SEARCH, "state"): "a search carries nothing on",
    (SEARCH, "gradients"): "a list is of whole numbers, through which no gradient comes",
    **{(op, "nan"): MIXED for op in MASKED},
    ("causal_conv", "decays"): "taps do not decay",
    ("causal_conv", "state"): "its carried inputs are cut out by plain torch, for every path",
}
TORCH_ON_GPU = {
    "rglru": "calls torch's pointwise operations, which a compiler fuses",
    "rms_norm": "calls torch's own norm, which is one kernel there",
    "rotary": "calls torch's pointwise operations, which a compiler fuses",
    "swiglu": "calls torch's pointwise operations, which a compiler fuses",
}
"""Operators without a Triton kernel, each with what a GPU runs instead."""


@dataclass(frozen=True)
class Test:
    """One test that pytest ran.

    Attributes:
        words: its name and its fixtures.
        failure: what it said; None where it passed.
    """

    operator: str
    name: str
    words: str
    seconds: float
    failure: str | None

    def shows(self, property_name: str) -> bool:
        """Tell whether it is about the property."""
        return re.search(PROPERTIES[property_name], self.words) is not None


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    known = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.run", description=__doc__)
    parser.add_argument("operators", nargs="*", help="all if not given")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="operators at a time")
    options = parser.parse_args(words)
    unknown = sorted(set(options.operators) - set(known))
    if unknown:
        parser.error(f"unknown operators {unknown}; known are {', '.join(known)}")
    begin = time.monotonic()
    with ThreadPoolExecutor(options.processes) as pool:
        groups = list(pool.map(run_operator, options.operators or known))
    tests = [test for group in groups for test in group]
    seconds = Measurement("all", time.monotonic() - begin, "s")
    rows = [*measurements(tests), seconds]
    (options.root / "reports").mkdir(parents=True, exist_ok=True)
    target = "kernel_tests_part" if options.operators else "kernel_tests"
    path = write_measurements(target, rows, options.root)
    show(tests, Console(width=None if sys.stdout.isatty() else 150, highlight=False))
    sys.stdout.write(f"{len(tests)} tests in {seconds.value:.0f} s; written to {path}\n")
    broken = [f"{row.name} ({row.value:g})" for row in rows if row.holds is False]
    sys.stdout.write(f"not in order: {'; '.join(broken)}\n" if broken else "all in order\n")
    return 1 if broken else 0


def run_operator(operator: str) -> list[Test]:
    """Run one operator's tests in a process of its own, whose Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o",
            "junit_family=xunit1", f"--junitxml={results}", str(TESTS / f"test_{operator}.py"),
        ]  # fmt: skip
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        tests = read_results(operator, results) if results.is_file() else []
    if not tests or (ended.returncode and all(test.failure is None for test in tests)):
        message = f"pytest ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-2000:]}"
        tests.append(Test(operator, "pytest", "", 0.0, message))
    sys.stdout.write(f"{operator}: {len(tests)} tests, {sum(t.seconds for t in tests):.0f} s\n")
    sys.stdout.flush()
    return tests


def read_results(operator: str, path: Path) -> list[Test]:
    """The tests in pytest's file of results; one that was skipped has failed to show anything."""
    tests = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        outcomes = [x for tag in ("failure", "error", "skipped") for x in case.iter(tag)]
        failure = f"{outcomes[0].tag}: {outcomes[0].get('message', '')}" if outcomes else None
        fixtures = " ".join(x.get("value", "") for x in case.iter("property"))
        name = case.get("name", "")
        words = f"{name} {fixtures}"
        tests.append(Test(operator, name, words, float(case.get("time", 0)), failure))
    return tests


def verdict(tests: Sequence[Test], operator: str, property_name: str) -> str:
    """What is known: the count of tests that passed, FAILED, n/a, or MISSING."""
    about = [t for t in tests if t.operator == operator and t.shows(property_name)]
    failed = sum(test.failure is not None for test in about)
    if failed:
        return f"FAILED {failed}/{len(about)}"
    if about:
        return str(len(about))
    return "n/a" if (operator, property_name) in NOT_APPLICABLE else "MISSING"


def measurements(tests: Sequence[Test]) -> list[Measurement]:
    """The rows of the report."""
    rows = []
    for operator in dict.fromkeys(test.operator for test in tests):
        own = [test for test in tests if test.operator == operator]
        failed = sum(test.failure is not None for test in own)
        missing = sum(verdict(own, operator, name) == "MISSING" for name in PROPERTIES)
        rows += [
            Measurement(f"{operator}: tests", len(own), "tests"),
            Measurement(f"{operator}: failed", failed, "tests", 0),
            Measurement(f"{operator}: properties untested without a reason", missing, "", 0),
            Measurement(f"{operator}: time", sum(test.seconds for test in own), "s"),
        ]
    return rows


def show(tests: Sequence[Test], console: Console) -> None:
    """Print the table, the reasons for what is not applicable, and every failure."""
    table = Table(title="tests that passed, by operator and property", box=None)
    table.add_column("operator", no_wrap=True)
    for name in PROPERTIES:
        table.add_column(name, justify="right")
    operators = list(dict.fromkeys(test.operator for test in tests))
    for operator in operators:
        table.add_row(operator, *(verdict(tests, operator, name) for name in PROPERTIES))
    for operator in TORCH_ON_GPU:
        table.add_row(operator, *("torch" for _ in PROPERTIES))
    console.print(table)
    for operator, reason in TORCH_ON_GPU.items():
        console.print(f"torch: {operator}: no Triton kernel; {reason}", soft_wrap=True)
    for (operator, name), reason in NOT_APPLICABLE.items():
        if operator in operators and verdict(tests, operator, name) == "n/a":
            console.print(f"n/a: {operator}, {name}: {reason}", soft_wrap=True)
    for test in tests:
        if test.failure is not None:
            line = f"{test.operator} {test.name}: {test.failure}"
            console.print(f"FAILED {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
