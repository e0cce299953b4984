"""The linters, one after the other: format, lint, types, import rules, written paths.

python -m tests.check            all of them; what `make check` runs
python -m tests.check --floors   a table and a drawing of what stands on what in each folder
"""

import subprocess
import sys
import time

from launch.measurements import Measurement, write_measurements
from tests.floors import show_floors
from tests.groups import LINTERS, ROOT


def check() -> list[Measurement]:
    """Run every linter; a measurement each, 0 for content."""
    measured = []
    for linter in LINTERS:
        begin = time.monotonic()
        ended = subprocess.run(linter.command, cwd=ROOT, check=False)
        sys.stdout.write(f"{linter.name}: {'ok' if ended.returncode == 0 else 'FAILED'}\n")
        sys.stdout.flush()
        measured.append(Measurement(f"{linter.name} exit code", abs(ended.returncode), "", 0))
        measured.append(Measurement(f"{linter.name} time", time.monotonic() - begin, "s"))
    return measured


def main() -> int:
    """Run the command; returns the exit code."""
    if "--floors" in sys.argv[1:]:
        return show_floors(ROOT)
    measured = check()
    write_measurements("check", measured, ROOT)
    return 0 if all(m.holds is not False for m in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
