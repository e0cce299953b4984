"""The launcher on a real SLURM: what `make slurm` runs."""

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from launch.measurements import Measurement, write_measurements
from tests.cluster.cluster import Cluster, install, missing
from tests.cluster.drill import Drill

ROOT = Path(__file__).parent.parent.parent
MINUTES = 8


def main() -> int:
    """Run the command; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reason = missing()
    if reason:
        reason = _install(reason)
    if sys.argv[1:] == ["--install"]:
        say(f"cannot run here: {reason}" if reason else "installed")
        return 0
    if reason:
        say(f"not run: {reason}")
        write_measurements("slurm", [Measurement(f"not run: {reason}", 0, "runs")], ROOT)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="crossladder-runs-"))
    try:
        measured = run_drill(folder)
    except RuntimeError as error:
        say(f"error: {error}")
        measured = [Measurement(f"ended early: {error}"[:400], 1, "", 0)]
    for each in measured:
        promised = "" if each.bound is None else f" (promised: {_side(each)} {each.bound:g})"
        say(f"{each.name}: {each.value:g} {each.unit}".rstrip() + promised)
    write_measurements("slurm", measured, ROOT)
    broken = [m.name for m in measured if m.holds is False]
    if broken:
        say(f"not in order: {'; '.join(broken)}; records and logs: {folder}")
        return 1
    shutil.rmtree(folder)
    say("all in order")
    return 0


def run_drill(folder: Path) -> list[Measurement]:
    """Put the smoke sweep through the drill, with records under a folder.

    Raises:
        RuntimeError: the cluster did not start, or the sweep did not get where it was waited for.
    """
    begin = time.monotonic()
    with Cluster() as cluster:
        say(f"SLURM is up after {time.monotonic() - begin:.0f} s: two nodes, accounting")
        measured = Drill(cluster, folder, ROOT, say).run()
    seconds = time.monotonic() - begin
    say(f"SLURM is down; {seconds:.0f} s in all")
    killed = Measurement("daemons and jobs killed at the end", len(cluster.killed), "", 0)
    return [*measured, killed, Measurement("time in all", seconds, "s", 60 * MINUTES)]


def say(line: str) -> None:
    """Tell the user."""
    sys.stdout.write(f"slurm: {line}\n")
    sys.stdout.flush()


def _side(measured: Measurement) -> str:
    return "at most" if measured.better == "lower" else "at least"


def _install(reason: str) -> str:
    """Try to install what is missing; what still is."""
    say(f"{reason}; trying to install it, without starting any service")
    try:
        install()
    except RuntimeError as error:
        return str(error)
    return missing()


if __name__ == "__main__":
    sys.exit(main())
