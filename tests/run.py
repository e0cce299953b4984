"""The linters and every test: what `make test` runs.

python -m tests.run                        all of it, two groups of tests at a time
python -m tests.run launch "analysis: *"   only groups of these names
python -m tests.run --workers 4            on a machine with more cores and memory

Each group is a process with one thread, whose output is printed whole when it ends; a table of all
groups and the failures of all of them come last. Groups share no files, so their order is free.
Writes reports/test.json, or reports/test_part.json if names are given. A group's processor time
does not count ranks that a fork server started, which nobody waits for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch

from launch.measurements import Measurement, write_measurements
from tests.groups import ROOT, Group, groups

WORKERS = 2


@dataclass(frozen=True)
class Ended:
    """A group that was run.

    Attributes:
        seconds: by the clock.
        processor_seconds: user and system time of its processes.
    """

    group: Group
    code: int
    seconds: float
    processor_seconds: float
    output: str

    def line(self) -> str:
        """What is known of it, in one line."""
        verdict = "ok" if self.code == 0 else f"FAILED ({self.code})"
        last = self.output.rstrip().rpartition("\n")[2].strip("= ")
        times = f"{self.seconds:5.0f} s, processor {self.processor_seconds:5.0f} s"
        return f"{self.group.name:28} {verdict:10} {times}  {last}"

    def failures(self) -> list[str]:
        """The lines that name a failure."""
        begins = ("FAILED ", "ERROR ", "not in order")
        return [line for line in self.output.splitlines() if line.startswith(begins)]

    def measurements(self) -> list[Measurement]:
        """Its rows of the report."""
        name = self.group.name
        return [
            Measurement(f"{name}: exit code", abs(self.code), "", 0),
            Measurement(f"{name}: time", self.seconds, "s"),
            Measurement(f"{name}: processor time", self.processor_seconds, "s"),
        ]


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.run")
    parser.add_argument("names", nargs="*", help="groups to run, as patterns; all if not given")
    parser.add_argument("--workers", type=int, default=WORKERS, help="groups at a time")
    options = parser.parse_args(words)
    every = groups()
    chosen = [g for g in every if any(fnmatch(g.name, name) for name in options.names or "*")]
    if not chosen:
        parser.error(f"no group of these names; there are: {'; '.join(g.name for g in every)}")
    begin = time.monotonic()
    with ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(run, group) for group in chosen]
        ended = [report(each.result()) for each in as_completed(running)]
    rows = [row for each in ended for row in each.measurements()]
    rows.append(Measurement("all: time", time.monotonic() - begin, "s"))
    rows.append(Measurement("all: processor time", sum(e.processor_seconds for e in ended), "s"))
    write_measurements("test_part" if options.names else "test", rows, ROOT)
    return conclude(ended)


def run(group: Group) -> Ended:
    """Run a group to its end, with what it writes kept apart."""
    say(f"started: {group.name}")
    begin = time.monotonic()
    # More threads than cores wait for each other by spinning.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as file:
        process = subprocess.Popen(
            group.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read().decode(errors="replace")
    seconds = time.monotonic() - begin
    return Ended(group, process.returncode, seconds, used.ru_utime + used.ru_stime, output)


def report(ended: Ended) -> Ended:
    """Print what a group wrote."""
    say(f"\n===== {ended.group.name}\n{ended.output.rstrip()}\n===== {ended.line()}\n")
    return ended


def conclude(ended: Sequence[Ended]) -> int:
    """Print the table and all failures; returns the exit code."""
    say("\n".join(each.line() for each in ended))
    for each in ended:
        for line in each.failures():
            say(f"{each.group.name}: {line}")
    broken = [each.group.name for each in ended if each.code]
    say(f"not in order: {'; '.join(broken)}" if broken else "all in order")
    return 1 if broken else 0


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
