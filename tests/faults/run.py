"""SIGKILL on the smoke sweep, at random moments and at every point of a save: `make faults`.

An undisturbed sweep is trained first. Then, in folders of their own: the whole process group is
killed three times while one sweep trains; one trunk and its branches are killed at each point of a
save, and inside a decay branch; the data's build is killed. Each time the same command goes on, and
exact columns and final weights must equal those of the undisturbed sweep as hex.
"""

import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from launch.job import TrainJob, Unit
from launch.measurements import Measurement, write_measurements
from launch.plan import make_plan
from sweeps.grammar import read_sweep_file
from tests.faults.incarnations import Incarnations
from tests.launch.command import ROOT, command, start
from tests.trainer.study import read_exact
from trainer.checkpoint import FAULT_POINTS
from trainer.record import read_json, read_rows
from trainer.schedule import decay_begins

SMOKE = ("launch/sweep.py", "sweeps/smoke.yaml")
KILLS = 3
SEED = 7


def main() -> int:
    """Run the command; returns the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="crossladder-faults-"))
    measured = list(_drills(folder))
    for each in measured:
        _say(f"{each.name}: {each.value:g} {each.unit}" + ("" if each.holds else "  <-- broken"))
    write_measurements("faults", measured, ROOT)
    if all(each.holds is not False for each in measured):
        shutil.rmtree(folder)
        _say("all in order")
        return 0
    _say(f"not in order; records and logs: {folder}")
    return 1


def _drills(folder: Path) -> Iterator[Measurement]:
    words = (*SMOKE, f"execution.data_root={folder / 'data'}", "--runs")
    yield from _kill_data_build(folder, words)
    ended = command(*words, str(folder / "whole"))
    yield Measurement("undisturbed sweep: exit code", ended.returncode, "", 0)
    whole = folder / "whole" / "smoke"
    listed = yaml.safe_load((whole / "sweep.yaml").read_text())
    names = [*listed["runs"], *listed["trunks"], *listed["repeats"]]
    yield from _kill_at_random(folder, words, whole, names)
    yield from _kill_at_points(folder, whole)


def _kill_data_build(folder: Path, words: tuple[str, ...]) -> Iterator[Measurement]:
    killed = command(*words, str(folder / "none"), "--data", fault="build.before_manifest")
    # Whoever names a point that nothing passes has killed nothing.
    yield Measurement("killed while building data: survived", killed.returncode == 0, "builds", 0)
    whole = (folder / "data" / "smoke").exists()
    yield Measurement("data trusted after a killed build", whole, "datasets", 0)


def _kill_at_random(
    folder: Path, words: tuple[str, ...], whole: Path, names: list[str]
) -> Iterator[Measurement]:
    draw, runs = random.Random(SEED), folder / "killed"
    for kill in range(KILLS):
        trained = sum(_rows(runs / "smoke" / name) for name in names)
        aim = trained + draw.randint(60, 240)
        running = start(*words, str(runs))
        deadline = time.monotonic() + 240
        while sum(_rows(runs / "smoke" / n) for n in names) < aim and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        _say(f"kill {kill + 1}: all processes, about {aim} steps into the sweep")
    ended = command(*words, str(runs))
    yield Measurement("sweep killed three times: exit code", ended.returncode, "", 0)
    apart = [n for n in names if read_exact(runs / "smoke" / n) != read_exact(whole / n)]
    yield Measurement("sweep killed three times: folders that differ", len(apart), "folders", 0)
    redone = sum(_redone(runs / "smoke" / name) for name in names)
    yield Measurement("steps trained again, per kill", redone / KILLS, "steps", 3, "higher")


def _kill_at_points(folder: Path, whole: Path) -> Iterator[Measurement]:
    sweep = read_sweep_file(ROOT / SMOKE[1], [f"execution.data_root={folder / 'data'}"])
    unit = next(u for u in make_plan(sweep, whole).units if u.trunk is not None)
    names = [unit.name, *(branch.folder_name for branch in unit.branches)]
    longest = max(unit.branches, key=lambda e: e.run.steps)
    others = sum(e.run.steps - decay_begins(e.run) for e in unit.branches if e is not longest)
    inside = max(unit.forks) + others + (longest.run.steps - decay_begins(longest.run)) - 2
    faults = [f"{point}:3" for point in FAULT_POINTS] + [f"train.step:{inside}"]
    with Incarnations() as server:
        for number, fault in enumerate(faults):
            place = folder / f"point-{number}"
            first, second = (server.start(job, fault=f) for job, f in _orders(place, unit, fault))
            apart = [name for name in names if read_exact(place / name) != read_exact(whole / name)]
            broken = len(apart) + (first != -signal.SIGKILL) + (second != 0)
            yield Measurement(f"killed at {fault}: folders that differ", broken, "folders", 0)
            shutil.rmtree(place)


def _orders(place: Path, unit: Unit, fault: str) -> list[tuple[str, str]]:
    """The same job twice: under the fault, and without."""
    place.mkdir()
    job = place / "job.pkl"
    job.write_bytes(pickle.dumps(TrainJob(place, (unit,), None)))
    return [(str(job), fault), (str(job), "")]


def _rows(run: Path) -> int:
    return int(read_json(run / "STATUS.json").get("step", 0))


def _redone(run: Path) -> int:
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    return len(steps) - len(set(steps))


def _say(line: str) -> None:
    sys.stdout.write(f"faults: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
