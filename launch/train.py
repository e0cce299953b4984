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
from data_pipelines.tokenizers import vocabulary_size
from launch.cluster import run_units
from launch.data import build_data, print_repeats
from launch.job import TrainJob, Unit
from launch.journal import Journal
from launch.run_status import RunStatus, status_of
from sweeps.config import LauncherConfig
from sweeps.grammar import Experiment, resolve_precision
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig, sequences_at_once
from trainer.exit_codes import ExitCode
from trainer.record import number, read_json, read_run
from trainer.schema import ConfigError, load, merge, read_overrides, read_yaml

LINE_SECONDS = 2.0
EXAMPLES = """
examples:
  python launch/train.py sweeps/single.yaml
  python launch/train.py sweeps/single.yaml budget.tokens=40960 optimizer.learning_rate=0.02
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
    except (ConfigError, RuntimeError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return int(getattr(error, "exit_code", ExitCode.BAD_CONFIG))
    except KeyboardInterrupt:
        console.print("\nstopped; rerun the same command to resume")
        return int(ExitCode.INTERRUPTED)


def _train(arguments: argparse.Namespace, console: Console) -> int:
    experiment = read_experiment(arguments.run, arguments.override)
    runs = Path(arguments.runs)
    runs.mkdir(parents=True, exist_ok=True)
    folder = runs / experiment.folder_name
    plain = merge(read_yaml(arguments.run), read_overrides(arguments.override))
    launcher = load(LauncherConfig, plain.get("launcher", {}), "launcher")
    if "dataset" in plain:
        dataset = load(DatasetConfig, plain["dataset"], "dataset")
        require_fit(experiment.run, dataset)
        build_data(dataset, Path(experiment.execution.data_root), console)
    reads = [(experiment.run.corpus, experiment.run.budget.tokens)]
    print_repeats(reads, Path(experiment.execution.data_root), console)
    unit = Unit(experiment.folder_name, (experiment,))
    console.print(f"{experiment.run.architecture} {experiment.run.rung}, records in {folder}")
    with _Ticker(folder, console):
        if experiment.execution.ranks == 1:
            TrainJob(runs, (unit,), None).run()
        else:
            run_units([unit], launcher, runs, lambda: None)
    return _conclude(experiment, folder, console)


def require_fit(run: RunConfig, dataset: DatasetConfig) -> None:
    """Check that a run can read a dataset, before the dataset is built.

    Raises:
        ConfigError: it names another dataset, other blocks or another tokenizer.
    """
    corpus = run.corpus
    for key, asked, built in (
        ("dataset", corpus.dataset, dataset.name),
        ("block_tokens", corpus.block_tokens, dataset.block_tokens),
        ("tokenizer", corpus.tokenizer, dataset.tokenizer),
    ):
        if asked != built:
            raise ConfigError(
                f"corpus.{key} is {asked}, but the dataset of the same file has {built}; "
                "make them equal"
            )


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
        sequences_at_once(experiment.run, experiment.execution)
        ids, known = vocabulary_size(experiment.run.corpus.tokenizer), experiment.run.model
        if known.vocab_size < ids:
            raise ConfigError(
                f"model.vocab_size {known.vocab_size} is less than the {ids} ids of "
                f"corpus.tokenizer; set it to at least {ids}"
            )
        require_amounts(experiment.run.corpus, experiment.run.budget.tokens)
        return experiment
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _conclude(experiment: Experiment, folder: Path, console: Console) -> int:
    if status_of(experiment, folder) is not RunStatus.DONE:
        failures = Journal(folder.parent).failures(0.0)
        reason = failures.get(folder.name) or read_json(folder / "STATUS.json").get("message")
        console.print(
            f"[red]not complete:[/red] {escape(str(reason))}", highlight=False, soft_wrap=True
        )
        return 1
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
        while not self._ended.wait(LINE_SECONDS):
            status = read_json(self._folder / "STATUS.json")
            if status.get("state") == "running":
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
    parser.add_argument("override", nargs="*", help="key=value, replaces a key of the YAML file")
    parser.add_argument(
        "--runs", default="runs/single", help="folder of the run record (default: runs/single)"
    )
    return parser.parse_intermixed_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
