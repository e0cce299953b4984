"""The whole test suite and the linters: what `make test` runs."""

import subprocess
import sys
import time
from pathlib import Path

from launch.measurements import Measurement, write_measurements
from tests.check import check

ROOT = Path(__file__).parent.parent
TYPED = ("--jaxtyping-packages=models,kernels,beartype.beartype",)
# What compiles or interprets Triton's source cannot have it rewritten by the shape checks.
TRITON = "tests/benchmarks/kernels/test_report.py"
PYTEST = ("pytest", "-q", "--durations=8")
STAGES = (
    (
        "models and kernels, shapes checked",
        (*PYTEST, *TYPED, "tests/models", "tests/kernels"),
    ),
    ("Triton kernels, interpreted", ("tests.kernels.run",)),
    ("Triton kernels, compiled", (*PYTEST, TRITON)),
    (
        "everything else",
        (*PYTEST, "tests", "--ignore=tests/models", "--ignore=tests/kernels", f"--ignore={TRITON}"),
    ),
)


def main() -> int:
    """Run the command; returns the exit code."""
    measured = check()
    for name, words in STAGES:
        begin = time.monotonic()
        ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False)
        measured.append(Measurement(f"{name}: exit code", abs(ended.returncode), "", 0))
        measured.append(Measurement(f"{name}: time", time.monotonic() - begin, "s"))
    write_measurements("test", measured, ROOT)
    broken = [m.name for m in measured if m.holds is False]
    sys.stdout.write(f"not in order: {'; '.join(broken)}\n" if broken else "all in order\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
