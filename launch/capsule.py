"""The command that packs a study into one file, or retrains one of its runs as a check.

python launch/capsule.py pack runs/scaling scaling.tar.gz
python launch/capsule.py retrain scaling.tar.gz [--run <id>] [--tolerance 0.001]
"""

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.tables.capsule import Capsule, pack, unpack
from analysis.tables.frames import keep, where
from launch.data import build_data
from launch.job import TrainJob, Unit
from launch.run_status import RunStatus, require_same_data, require_same_run, status_of
from sweeps.grammar import Experiment, Sweep, read_sweep_file
from trainer.exit_codes import ExitCode
from trainer.failures import failure_of
from trainer.ids import evaluation_id
from trainer.record import StoredRun, number, read_run
from trainer.schema import ConfigError, read_yaml
from untrusted.paths import inside
from untrusted.yaml_text import dump_yaml

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Drift:
    """One evaluation set: the loss that was stored, the one found now [nats per token]."""

    evaluation_set: str
    stored: float
    now: float

    @property
    def relative(self) -> float:
        """Difference of ln L."""
        return math.log(self.now / self.stored)


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console()
    try:
        if arguments.command == "pack":
            file = pack(arguments.sweep, ROOT, arguments.target)
            console.print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", highlight=False)
            return int(ExitCode.DONE)
        return _retrain(arguments, console)
    except (ConfigError, ValueError, RuntimeError, OSError) as error:
        reason, code = failure_of(error, ExitCode.BAD_CONFIG)
        console.print(f"[red]error:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
        return int(code)


def _retrain(arguments: argparse.Namespace, console: Console) -> int:
    with tempfile.TemporaryDirectory(prefix="capsule-") as scratch:
        capsule = unpack(arguments.capsule, Path(scratch) / "opened")
        sweep = sweep_of(capsule, Path(scratch) / "sweep.yaml")
        experiment = smallest(capsule, sweep, arguments.run)
        found = retrain(capsule, sweep, experiment, Path(scratch) / "runs", console)
    for each in found:
        console.print(
            f"{each.evaluation_set}: {each.stored:.6f} nats stored, {each.now:.6f} now, "
            f"drift {100 * each.relative:+.4f} %",
            highlight=False,
        )
    worst = max(abs(each.relative) for each in found)
    verdict = "within" if worst <= arguments.tolerance else "beyond"
    console.print(f"run {experiment.run_id}: {verdict} {arguments.tolerance:g} of ln L")
    return int(ExitCode.DONE) if worst <= arguments.tolerance else 1


def sweep_of(capsule: Capsule, scratch: Path) -> Sweep:
    """The study's sweep, expanded from its stored configuration."""
    stored = read_yaml(capsule.folder / "sweep.yaml")
    scratch.write_text(dump_yaml(stored["config"]))
    return read_sweep_file(scratch, [])


def smallest(capsule: Capsule, sweep: Sweep, run_id: str | None) -> Experiment:
    """The named run, or the finished one with the fewest training FLOPs.

    Raises:
        ConfigError: the capsule holds no such finished run, or the sweep no longer expands to it.
    """
    done = where(capsule.rows, "status", "done")
    done = keep(done, done["decayed"].astype(bool))
    if run_id is None and len(done):
        run_id = str(done.sort_values(by=["flops"], kind="stable")["run_id"].iloc[0])
    if run_id not in set(done["run_id"]):
        known = ", ".join(sorted(set(done["run_id"]))[:5])
        raise ConfigError(
            f"run {run_id} is not a finished run of this capsule; choose from {known}"
        )
    for experiment in sweep.experiments:
        if experiment.folder_name == run_id:
            return experiment
    raise ConfigError(
        f"the stored sweep does not expand to run {run_id} with this version on this machine; "
        "check out the commit in its provenance.json"
    )


def retrain(
    capsule: Capsule, sweep: Sweep, experiment: Experiment, runs: Path, console: Console
) -> list[Drift]:
    """Train one run again from scratch, and compare its final losses with the stored ones.

    Raises:
        RuntimeError: it did not finish, or the data differ.
    """
    before = inside(capsule.folder, "runs", experiment.folder_name)
    require_same_run(experiment, before, ("evaluations.jsonl",))
    data_root = Path(experiment.execution.data_root)
    require_same_data(before, build_data(sweep.corpora.dataset, data_root, console))
    runs.mkdir(parents=True)
    console.print(
        f"training {experiment.run.architecture} {experiment.run.rung} on "
        f"{experiment.run.corpus.name} again, {experiment.run.budget.tokens / 1e6:.2f} M tokens",
        highlight=False,
    )
    TrainJob(runs, (Unit(experiment.folder_name, (experiment,)),), None).run_here()
    folder = inside(runs, experiment.folder_name)
    if status_of(experiment, folder) is not RunStatus.DONE:
        raise RuntimeError(
            f"run {experiment.run_id} did not finish; run it with launch/train.py to see why"
        )
    wanted = evaluation_id(experiment.evaluation)
    old, new = (_last_losses(read_run(each), wanted) for each in (before, folder))
    return [Drift(name, old[name], new[name]) for name in sorted(old.keys() & new.keys())]


def _last_losses(run: StoredRun, wanted: str) -> dict[str, float]:
    last = run.summary["step"]
    return {
        str(row["evaluation_set"]): number(row, "total_nats") / number(row, "targets")
        for row in run.evaluations
        if row["step"] == last and row["evaluation_id"] == wanted
    }


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/capsule.py",
        description="Pack a study into one file, or retrain one of its runs as a check.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser(
        "pack", help="pack configs, run table, manifests, lock file and report"
    )
    packing.add_argument("sweep", type=Path, help="sweep folder, such as runs/scaling")
    packing.add_argument("target", type=Path, help=".tar.gz file to write")
    training = commands.add_parser(
        "retrain", help="train one run again and report the drift of its losses"
    )
    training.add_argument("capsule", type=Path, help=".tar.gz file that pack wrote")
    training.add_argument("--run", help="run id (default: the run with the fewest FLOPs)")
    training.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest drift of ln(loss) (default: 0.001)"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
