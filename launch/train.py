"""The command that trains one run, described by one YAML file, on this machine.

python launch/train.py sweeps/single.yaml [key=value ...]
"""

import argparse
import sys
import threading
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data_pipelines.config import DatasetConfig
from data_pipelines.shares import require_amounts
from launch.cluster import run_units
from launch.data import build_data, print_repeats
from launch.job import TrainJob, Unit
from launch.journal import Journal
from launch.run_status import RunStatus, status_of
from sweeps.checks import check_domains, check_machine, check_run
from sweeps.config import LauncherConfig
from sweeps.grammar import Experiment, resolve_precision
from sweeps.overrides import refuse_unused_launcher
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.exit_codes import ExitCode
from trainer.failures import Failure, failure_of
from trainer.record import number, read_json, read_run, read_status
from trainer.schema import ConfigError, load, merge, read_overrides, read_yaml
from untrusted.paths import PathError, inside

LINE_SECONDS = 2.0
EXAMPLES = """
examples:
  python launch/train.py sweeps/single.yaml
  python launch/train.py sweeps/single.yaml budget.tokens=81920 optimizer.learning_rate=0.02
  python launch/train.py sweeps/single.yaml execution.ranks=2 execution.threads=1
  python launch/train.py sweeps/single.yaml execution.ranks=2 execution.sequence_parallel=2 \\
      execution.threads=1                                      2 ranks share each sequence
  python launch/train.py sweeps/single.yaml execution.ranks=8 launcher.slots=8   on fewer cores
  python launch/train.py runs/scaling/<id>/config.yaml --runs /tmp/again     any recorded run"""


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console()
    try:
        return _train(arguments, console)
    except (ConfigError, PathError, RuntimeError, OSError) as error:
        reason, code = failure_of(error, ExitCode.BAD_CONFIG)
        console.print(f"[red]error:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
        return int(code)
    except KeyboardInterrupt:
        console.print("\nstopped; rerun the same command to resume")
        return int(ExitCode.INTERRUPTED)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    experiment, launcher, dataset = read_run_file(arguments.run, arguments.override)
    runs = Path(arguments.runs)
    folder = inside(runs, experiment.folder_name)
    if dataset is not None:
        build_data(dataset, Path(experiment.execution.data_root), console)
        # Of some sources the domains are known only now.
        _check_data(experiment, dataset)
    reads = [(experiment.run.corpus, experiment.run.budget.tokens)]
    print_repeats(reads, Path(experiment.execution.data_root), console)
    runs.mkdir(parents=True, exist_ok=True)
    unit = Unit(experiment.folder_name, (experiment,))
    console.print(f"{experiment.run.architecture} {experiment.run.rung}, records in {folder}")
    job = TrainJob(runs, (unit,), None)
    with _Ticker(folder, console):
        if experiment.execution.ranks == 1:
            job.run_here()
        else:
            run_units([unit], launcher, runs, lambda: None)
    return _conclude(experiment, folder, job, console)


def read_run_file(
    path: Path, overrides: list[str]
) -> tuple[Experiment, LauncherConfig, DatasetConfig | None]:
    """The run that a YAML file and overrides describe, how it is launched, and its dataset.

    Raises:
        ConfigError: a key is unknown, missing or out of range, or the run fits neither this
            machine nor the data, as far as that is known before anything is spent.
    """
    experiment = read_experiment(path, overrides)
    plain = merge(read_yaml(path), read_overrides(overrides))
    launcher = load(LauncherConfig, plain.get("launcher", {}), "launcher")
    _refuse_unused(overrides, experiment.execution, launcher)
    check_machine([experiment.execution], launcher)
    if "dataset" not in plain:
        return experiment, launcher, None
    dataset = load(DatasetConfig, plain["dataset"], "dataset")
    _check_data(experiment, dataset)
    return experiment, launcher, dataset


def read_experiment(path: Path, overrides: list[str]) -> Experiment:
    """The run that a YAML file and overrides describe.

    Raises:
        ConfigError: a key is unknown, missing or out of range.
    """
    plain = merge(read_yaml(path), read_overrides(overrides))
    execution = plain.pop("execution", {})
    evaluation = plain.pop("evaluation", {})
    for section in ("dataset", "launcher"):
        plain.pop(section, None)
    if plain.get("precision", "auto") == "auto":
        plain["precision"] = resolve_precision("auto")
    try:
        experiment = Experiment(
            load(RunConfig, plain),
            load(ExecutionConfig, execution, "execution"),
            load(EvaluationConfig, evaluation, "evaluation"),
        )
        check_run(experiment.run, experiment.execution)
        require_amounts(experiment.run.corpus, experiment.run.budget.tokens)
        return experiment
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_data(experiment: Experiment, dataset: DatasetConfig) -> None:
    """Check that the dataset of the run's file is the one that the run reads."""
    corpus, root = experiment.run.corpus, Path(experiment.execution.data_root)
    for key, built, read in (
        ("name", dataset.name, corpus.dataset),
        ("tokenizer", dataset.tokenizer, corpus.tokenizer),
        ("block_tokens", dataset.block_tokens, corpus.block_tokens),
    ):
        if built != read:
            where = "dataset" if key == "name" else key
            raise ConfigError(
                f"dataset.{key} is {built}, but corpus.{where} is {read}; make them equal"
            )
    named = {"evaluation.final_sets": experiment.evaluation.final_sets or ()}
    check_domains({corpus.name: corpus.domains}, named, dataset, root)


def _refuse_unused(
    overrides: list[str], execution: ExecutionConfig, launcher: LauncherConfig
) -> None:
    """Check that overrides of the launcher have a part in the run."""
    given = read_overrides(overrides).get("launcher") or {}
    unused = [key for key in given if key != "slots"]
    if unused and execution.ranks == 1:
        raise ConfigError(
            f"launcher.{unused[0]} is for runs of several ranks, but execution.ranks is 1, "
            "which trains in this process; remove it or raise execution.ranks"
        )
    refuse_unused_launcher(given, launcher.cluster)


def _conclude(experiment: Experiment, folder: Path, job: TrainJob, console: Console) -> int:
    failures = Journal(folder.parent).failures(job.begun or 0) | job.failed
    status = status_of(experiment, folder)
    if folder.name in failures or status is not RunStatus.DONE:
        found = failures.get(folder.name) or _ended(folder, status)
        word = "diverged" if status is RunStatus.DIVERGED else "not complete"
        console.print(f"[red]{word}:[/red] {escape(found.reason)}", highlight=False, soft_wrap=True)
        return int(found.code)
    stored = read_run(folder)
    changed = (
        "" if experiment.run.corpus.tokenizer.lossless else " of text changed by the tokenizer"
    )
    for row in stored.evaluations:
        if row.get("error"):
            console.print(f"evaluation at step {row['step']} failed: {escape(str(row['error']))}")
            continue
        nats = number(row, "total_nats") / number(row, "targets")
        console.print(
            f"step {row['step']} {row['evaluation_set']}: {nats:.4f} nats per token, "
            f"{number(row, 'bits_per_byte'):.4f} bits per byte{changed}",
            highlight=False,
        )
    return int(ExitCode.DONE)


def _ended(folder: Path, status: RunStatus) -> Failure:
    """Why a run that raised no error is not done."""
    if status is RunStatus.DIVERGED:
        return Failure(str(read_json(folder / "summary.json")["message"]), ExitCode.NUMERIC_HALT)
    if status is RunStatus.UNEVALUATED:
        errors = [row["error"] for row in read_run(folder).evaluations if row.get("error")]
        reason = f"its last evaluation failed: {errors[-1]}" if errors else "it was not evaluated"
    else:
        stored = read_status(folder)
        reason = stored.get("message") or f"a process ended at step {stored.get('step', 0)}"
    return Failure(f"{reason}; rerun the same command to resume", ExitCode.FAILED)


class _Ticker:
    """Prints the step, loss and speed of the run every few seconds."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _tick(self) -> None:
        last = None
        while not self._ended.wait(LINE_SECONDS):
            status = read_status(self._folder)
            shown = {"step", "steps", "loss_nats", "tokens_per_second"}
            # A loss that is not finite is stored as none.
            running = status.get("state") == "running" and shown <= status.keys()
            # The step stands still while a run is evaluated or saved.
            if running and status["step"] != last:
                last = status["step"]
                self._console.print(
                    f"step {status['step']}/{status['steps']}  loss {status['loss_nats']:.3f}  "
                    f"{status['tokens_per_second'] / 1e3:.0f} k tokens/s",
                    highlight=False,
                )


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Train one run, described by one YAML file, on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="YAML file of the run, such as sweeps/single.yaml")
    parser.add_argument(
        "override", nargs="*", default=[], help="key=value, replaces a key of the YAML file"
    )
    parser.add_argument(
        "--runs", default="runs/single", help="folder of the run record (default: runs/single)"
    )
    return parser.parse_intermixed_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
