"""The command that trains a sweep: print the plan, train missing runs, redraw the report.

python launch/sweep.py sweeps/scaling.yaml [key=value ...] [--plan | --status | --data]
"""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from analysis.report.write import refresh
from analysis.words.terminal import print_whole
from launch.baselines import write_baselines
from launch.cluster import run_units
from launch.data import build_data, print_repeats, verify_data
from launch.job import Unit
from launch.journal import Journal
from launch.keys import keys_page
from launch.plan import (
    GPU_FLOPS,
    GPU_SHARE,
    Plan,
    duration,
    expected_lines,
    make_plan,
    on_absent_gpu,
    plan_table,
)
from launch.progress import Progress, stretches, trained_tokens
from launch.run_status import RunStatus, require_same_data, survey
from launch.study_folder import describe, earlier_study, hold, write_study
from launch.tuning_plan import tuning_lines
from sweeps.checks import available_slots, check_domains, check_machine
from sweeps.grammar import Sweep, read_sweep_file
from trainer.exit_codes import ExitCode
from trainer.failures import Failure, failure_of
from trainer.schema import ConfigError
from untrusted.paths import PathError, inside, refuse_links

REDRAW_SECONDS = 45.0
REDRAW_PAUSE = 10.0
"""Between two redraws, in times of what the last one took."""
RESUBMISSIONS = 2
EXAMPLES = """
examples:
  python launch/sweep.py sweeps/scaling.yaml                  the default study, on this machine
  python launch/sweep.py sweeps/scaling.yaml --plan           what it would train, and the cost
  python launch/sweep.py sweeps/scaling.yaml ladder=evening   up to 460 k parameters, two seeds
  python launch/sweep.py sweeps/scaling.yaml model.blocks.m.mixer.d_state=32
  python launch/sweep.py --keys optimizer                     the YAML keys of the optimizer
  python launch/sweep.py sweeps/scaling.yaml ladder=pile corpus=pile launcher.cluster=slurm

You can stop the command at any time and rerun it: complete runs are not trained again, and the
others resume from their newest checkpoint. Run records are in runs/<sweep>/, the report is
runs/<sweep>/report/index.html."""


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console()
    try:
        sweep = read_sweep_file(arguments.sweep, arguments.override)
        return _run(sweep, arguments, console)
    except (ConfigError, PathError, RuntimeError, OSError) as error:
        reason, code = failure_of(error, ExitCode.BAD_CONFIG)
        console.print(f"[red]error:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
        return int(code)
    except KeyboardInterrupt:
        console.print("\nstopped; rerun the same command to resume")
        return int(ExitCode.INTERRUPTED)


def _run(sweep: Sweep, arguments: argparse.Namespace, console: Console) -> int:
    folder = inside(Path(arguments.runs), sweep.folder_name)
    refuse_links(folder)
    check_sweep(sweep)
    plan = make_plan(sweep, folder)
    statuses, damage = survey(sweep.experiments, folder)
    for name, reason in damage.items():
        console.print(
            f"[red]damaged:[/red] {name}: {escape(reason)}", highlight=False, soft_wrap=True
        )
    todo = [unit for unit in plan.units if _is_open(unit, statuses)]
    _print_plan(plan, todo, statuses, folder, console)
    study = describe(plan)
    if change := earlier_study(folder, study):
        console.print(
            f"{escape(change)}; the first one's report is kept in {folder / 'earlier'}",
            highlight=False,
            soft_wrap=True,
        )
    if arguments.plan:
        for line in (*tuning_lines(plan), *expected_lines(plan, folder)):
            console.print(line, highlight=False, soft_wrap=True)
    data_root = Path(sweep.experiments[0].execution.data_root)
    reads = [(e.run.corpus, e.run.budget.tokens) for e in sweep.experiments]
    if arguments.plan:
        print_repeats(reads, data_root, console)
    if arguments.plan or arguments.status:
        return int(ExitCode.DONE)
    if arguments.data or arguments.verify:
        return _make_data(sweep, console, verify=arguments.verify)
    with hold(folder, study["id"]):
        root_hash = build_data(sweep.corpora.dataset, data_root, console)
        print_repeats(reads, data_root, console)
        # Of some sources the domains are known only now.
        check_sweep(sweep)
        for name, status in statuses.items():
            if status.ended:
                require_same_data(inside(folder, name), root_hash)
        write_study(folder, plan, study)
        return _train_study(plan, todo, (folder, data_root, root_hash), console)


def check_sweep(sweep: Sweep) -> None:
    """Check all that can be known before anything is spent.

    Raises:
        ConfigError: names the key that does not fit this machine or the data.
    """
    executions = dict.fromkeys(experiment.execution for experiment in sweep.experiments)
    check_machine(executions, sweep.config.launcher)
    corpora = {e.run.corpus.name: e.run.corpus.domains for e in sweep.experiments}
    chosen, root = sweep.corpora, Path(sweep.experiments[0].execution.data_root)
    final_sets = sweep.experiments[0].evaluation.final_sets or ()
    named = {"neutral_set": (chosen.neutral_set,), "evaluation.final_sets": final_sets}
    check_domains(corpora, named, chosen.dataset, root)


def _make_data(sweep: Sweep, console: Console, *, verify: bool) -> int:
    dataset, data_root = sweep.corpora.dataset, Path(sweep.experiments[0].execution.data_root)
    build_data(dataset, data_root, console)
    if verify:
        verify_data(dataset, data_root)
        console.print(f"dataset {dataset.name} in {data_root}: every file matches its hash")
    return int(ExitCode.DONE)


def _train_study(
    plan: Plan, todo: list[Unit], places: tuple[Path, Path, str], console: Console
) -> int:
    """Train what is missing, and draw the report; `places` are as `write_baselines` takes them."""
    sweep, folder = plan.sweep, places[0]
    write_baselines(
        [experiment.run for experiment in sweep.experiments],
        sweep.experiments[0].evaluation,
        sweep.config.baselines,
        places,
        console,
    )
    begin = Journal(folder).mark()
    if todo:
        _train(plan, todo, folder, console)
    report = refresh(folder)
    console.print(escape(report.text()), highlight=False, soft_wrap=True)
    return _conclude(sweep, folder, begin, console)


def _train(plan: Plan, todo: list[Unit], folder: Path, console: Console) -> None:
    redraw, begin = _Redraw(folder), Journal(folder).mark()
    with Progress(plan, folder, todo, console) as show:

        def tick() -> None:
            show()
            redraw.tick()

        run_units(todo, plan.sweep.config.launcher, folder, tick)
        # Units whose job crashed are submitted again. A run that raised an error is not: it would
        # raise it again.
        for _ in range(RESUBMISSIONS):
            failed = Journal(folder).failures(begin)
            todo = [unit for unit in todo if _is_lost(unit, folder, failed)]
            if not todo:
                break
            run_units(todo, plan.sweep.config.launcher, folder, tick)
    redraw.wait()


def _conclude(sweep: Sweep, folder: Path, begin: int, console: Console) -> int:
    journal = Journal(folder)
    same: dict[str, list[str]] = {}
    failures = journal.failures(begin)
    for name, failure in failures.items():
        same.setdefault(failure.reason, []).append(name)
    for error, names in same.items():
        more = f" and {len(names) - 1} more runs" if len(names) > 1 else ""
        line = f"[red]failed:[/red] {inside(folder, names[0])}{more}: {escape(error)}"
        console.print(line, highlight=False, soft_wrap=True)
    for row in journal.rows(begin):
        if row["event"] == "job failed":
            error = escape(str(row["error"]))
            console.print(f"[red]job {row['job']} failed:[/red] {error}", highlight=False)
    statuses, damage = survey(sweep.experiments, folder)
    finished = sum(status.ended for status in statuses.values())
    if finished < len(statuses):
        console.print(
            f"{finished} of {len(statuses)} runs are complete; rerun the same command to resume. "
            f"Job logs are in {folder / 'jobs'}",
            highlight=False,
        )
        codes = {failure.code for failure in failures.values()}
        codes |= {ExitCode.BAD_DATA} if damage else set()
        return int(codes.pop() if len(codes) == 1 else ExitCode.FAILED)
    return int(ExitCode.DONE)


def _print_plan(
    plan: Plan, todo: list[Unit], statuses: dict[str, RunStatus], folder: Path, console: Console
) -> None:
    shown = {
        unit.name: " ".join(dict.fromkeys(statuses[e.folder_name].value for e in unit.branches))
        for unit in plan.units
    }
    print_whole(console, plan_table(plan, shown))
    slots = available_slots(plan.sweep.config.launcher)
    known = stretches(plan, folder)
    left = {unit.name: unit.tokens - trained_tokens(known[unit.name]) for unit in todo}
    seconds = sum(plan.seconds[u.name] * left[u.name] / max(u.tokens, 1) for u in todo)
    threads = max((u.branches[0].execution.threads for u in plan.units), default=1)
    workers = max(slots // threads, 1)
    complete = sum(status.ended for status in statuses.values())
    time_left = f"about {duration(seconds / workers)} on {workers} workers"
    if on_absent_gpu(plan.sweep.experiments[0]):
        ranks = plan.sweep.experiments[0].execution.ranks
        time_left = (
            f"about {ranks * seconds / 3600:,.0f} GPU hours, if an H100 reaches {GPU_SHARE:.0%} of "
            f"{GPU_FLOPS / 1e12:.0f} TFLOP/s; times are those of a run on {ranks} GPUs"
        )
    console.print(
        f"{len(plan.sweep.experiments)} runs on {len(plan.units)} trunks, {complete} complete; "
        f"{sum(left.values()) / 1e6:.1f} M tokens to train, {time_left}",
        highlight=False,
    )


def _is_open(unit: Unit, statuses: dict[str, RunStatus]) -> bool:
    return any(statuses[e.folder_name].open for e in unit.branches)


def _is_lost(unit: Unit, folder: Path, failed: Mapping[str, Failure]) -> bool:
    """Whether a unit is incomplete although none of its runs failed: its job ended early."""
    names = [e.folder_name for e in unit.branches] + [unit.name]
    statuses, _ = survey(unit.branches, folder)
    return _is_open(unit, statuses) and not any(name in failed for name in names)


class _PrintKeys(argparse.Action):
    """Prints the page of YAML keys and ends, as `--help` does, without a sweep file."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: object, prefix: object, _option: object
    ) -> None:
        """Print the keys that begin with the prefix."""
        try:
            sys.stdout.write(keys_page(str(prefix or "")) + "\n")
        except ConfigError as error:
            parser.error(str(error))
        parser.exit()


class _Redraw:
    """Redraws the report in a separate process while training goes on, as runs finish."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + REDRAW_SECONDS
        self._drawn = 0

    def tick(self) -> None:
        """Start a redraw if runs have finished since the last one, and that one has ended."""
        busy = self._thread is not None and self._thread.is_alive()
        if busy or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REDRAW_SECONDS
        finished = len(list(self._folder.glob("*/summary.json")))
        if finished > self._drawn:
            self._drawn = finished
            self._thread = threading.Thread(target=self._draw, name="redraw", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait for a redraw that is under way."""
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        command = ["nice", sys.executable, "-m", "analysis.report", str(self._folder)]
        begin = time.monotonic()
        # Its output would break up the live progress display.
        drawn = subprocess.run(command, capture_output=True, text=True, check=False)
        if drawn.returncode != 0:
            error = drawn.stderr.strip().rpartition("\n")[2]
            Journal(self._folder).write("redraw failed", code=drawn.returncode, error=error)
        # Training needs the processors: the page of a large study takes minutes of one.
        self._next = max(self._next, time.monotonic() + REDRAW_PAUSE * (time.monotonic() - begin))


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py",
        description="Train a ladder of model sizes for several architectures and corpora,\n"
        "fit scaling laws to the results and write a report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, help="sweep file, such as sweeps/scaling.yaml")
    parser.add_argument(
        "override", nargs="*", default=[], help="key=value, replaces a key of the sweep file"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the runs and their cost, and stop"
    )
    parser.add_argument(
        "--status", action="store_true", help="print the status of every run, and stop"
    )
    parser.add_argument("--data", action="store_true", help="build the data, and stop")
    parser.add_argument("--verify", action="store_true", help="check the data's hashes, and stop")
    parser.add_argument(
        "--keys",
        nargs="?",
        action=_PrintKeys,
        metavar="PREFIX",
        help="print every YAML key with its type, default and meaning, or those that begin with a "
        "prefix such as optimizer or model.blocks, and stop",
    )
    parser.add_argument("--runs", default="runs", help="folder of the run records (default: runs)")
    return parser.parse_intermixed_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
