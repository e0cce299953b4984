"""The report of a sweep: what is written where, when it is written again, and its terminal form.

python -m analysis.report runs/<sweep>      draw what has finished so far, if that is news
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.report.write import redraw


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report",
        description="Draw the report of a sweep folder from the runs that have finished.",
    )
    parser.add_argument("sweep", type=Path, help="a folder, such as runs/scaling")
    try:
        report = redraw(parser.parse_args(words).sweep)
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 64
    sys.stdout.write(report.text() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
