"""Fit a scaling law to a table of training runs.

python -m analysis.fit runs.csv --law chinchilla
python -m analysis.fit runs.csv --law chinchilla --by architecture
python -m analysis.fit runs.csv --columns N=Size,tokens=Tokens:B --at 7e9,1.4e11
python -m analysis.fit runs.csv --approaches --budget 1e21 --served 1e12
python -m analysis.fit runs.csv --by architecture --baseline transformer

Reads .csv, .tsv, .parquet or .jsonl. Prints how each column was read, which rows were left out,
warnings about the table, and every parameter with its 95 % interval. Exits with 1 if the table
cannot determine the law, with 2 if it cannot be read.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from analysis.fit.questions import Budget, approaches, bootstrap, lead, spending
from analysis.inference.model_selection import OmnibusTest, choose, omnibus_test
from analysis.inference.scaling_law import LAWS, Learnt, ScalingLaw
from analysis.laws.catalog import nested_family
from analysis.tables.column_matching import parse_columns
from analysis.tables.compute import six_nd
from analysis.tables.external import ExternalTable, read_external
from analysis.tables.frames import floats, strings, where
from analysis.validity.checks import check, evaluation
from analysis.validity.refusal import Refusal
from analysis.words.numbers import number
from analysis.words.terminal import print_whole


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(words)
    console = Console(soft_wrap=True)
    try:
        external = read_external(options.table, parse_columns(options.columns))
        sets = list(dict.fromkeys(strings(external.rows, "evaluation_set").tolist()))
        options.by = [_arm_column(external, name) for name in options.by]
        law = ScalingLaw(options.law, tuple(options.by), _names(options.varies), options.delta)
        for line in _reading(external):
            console.print(line, markup=False)
        # How many evaluation sets there are is a property of the table, not of one set.
        if (caveat := evaluation(external.rows)) is not None:
            console.print(str(caveat), markup=False)
        answers = [_answer(console, external, name, law, options) for name in sets]
    except ValueError as error:
        console.print(f"{options.table}: {error}", markup=False)
        return 2
    return 0 if all(answers) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "table", type=Path, help="table of runs: one row per run, checkpoint and evaluation set"
    )
    parser.add_argument(
        "--law", default="chinchilla", help=f"law to fit: {', '.join(sorted(LAWS))}"
    )
    parser.add_argument(
        "--by", nargs="*", default=[], help="columns whose combinations are separate arms"
    )
    parser.add_argument(
        "--varies", default="", help="parameters that differ between arms, as in A,B (default: all)"
    )
    parser.add_argument(
        "--delta",
        type=float,
        help="threshold of the Huber loss on ln L (default: 1.345 robust standard deviations)",
    )
    parser.add_argument(
        "--columns", default="", help="which column is which, as in N=Size,tokens=Tokens:B"
    )
    parser.add_argument("--at", default="", help="predict the loss at PARAMETERS,TOKENS")
    parser.add_argument(
        "--approaches",
        action="store_true",
        help="exponents of N*(C) and D*(C) by each of Hoffmann's approaches",
    )
    parser.add_argument(
        "--budget", type=float, help="compute-optimal size and tokens for these training FLOPs"
    )
    parser.add_argument(
        "--served",
        type=float,
        default=0.0,
        help="tokens that the trained model will serve (use with --budget)",
    )
    parser.add_argument(
        "--baseline", help="arm to compare the others with, in tokens, FLOPs and parameters"
    )
    parser.add_argument(
        "--allow", action="store_true", help="answer more than 10x beyond the largest compute"
    )
    return parser


def _arm_column(external: ExternalTable, name: str) -> str:
    """The column that `--by` names, by its own name in the file or by that of the schema.

    Raises:
        ValueError: the table has no such column.
    """
    named = {source.column: target for target, source in external.sources.items()}
    column = name if name in external.rows else named.get(name, name)
    if column not in external.rows:
        known = ", ".join(sorted({*named, *external.sources}))
        raise ValueError(f"--by {name!r} is no column that was read; there are {known}")
    return column


def _names(text: str) -> frozenset[str] | None:
    names = frozenset(filter(None, (part.strip() for part in text.split(","))))
    return names or None


def _answer(
    console: Console,
    external: ExternalTable,
    name: str,
    law: ScalingLaw,
    options: argparse.Namespace,
) -> bool:
    """Fit and print one evaluation set; whether the law could be fitted."""
    rows = where(external.rows, "evaluation_set", name).reset_index(drop=True)
    console.print(f"\n{len(rows)} points on {name}", markup=False)
    for caveat in check(rows):
        if caveat.code != "W-EVAL":
            console.print(str(caveat), markup=False)
    learnt = law.fit(rows).learnt_
    if isinstance(learnt, Refusal):
        console.print(str(learnt), markup=False)
        return False
    print_whole(console, _parameters(learnt))
    for line in _quality(learnt):
        console.print(line, markup=False)
    arms = {str(arm) for by in options.by for arm in rows[by]}
    if len(options.by) == 1 and options.law == "chinchilla" and len(arms) > 1:
        print_whole(console, _family(rows, tuple(options.by)))
        console.print(_omnibus_words(omnibus_test(learnt.fit, learnt.covariance)), markup=False)
    if options.at:
        console.print(_prediction(law, rows, options), markup=False)
    for line in _questions(rows, learnt, options):
        console.print(line, markup=False)
    return True


def _questions(rows: pd.DataFrame, learnt: Learnt, options: argparse.Namespace) -> Iterator[str]:
    if options.approaches:
        yield from approaches(rows, tuple(options.by))
    if options.budget is None and options.baseline is None:
        return
    if options.law != "chinchilla":
        raise ValueError(f"--budget and --baseline need --law chinchilla, not {options.law}")
    replicates = bootstrap(learnt.fit)
    if options.budget is not None:
        budget = Budget(options.budget, options.served, options.allow)
        yield from spending(learnt.fit, replicates, budget)
    if options.baseline is not None:
        yield from lead(learnt.fit, replicates, options.baseline)


def _reading(external: ExternalTable) -> Iterator[str]:
    for target, source in external.sources.items():
        yield f"{target}: column {source.column!r}" + (f" in {source.unit}" if source.unit else "")
    yield from external.notes
    if external.ignored:
        yield f"ignored columns: {', '.join(external.ignored)}"
    if len(external.rejected):
        yield f"{len(external.rejected)} values left out, the first: " + ", ".join(
            f"{key} {value}" for key, value in external.rejected.iloc[0].items()
        )


def _parameters(learnt: Learnt) -> Grid:
    """Exponents, and each term at the centre of the data, where it is best determined."""
    grid = Grid(title="centre: mean ln N and ln D of the data, where terms are best determined")
    for name in ("parameter", "at N = D = 1", "at the centre", "95 % interval", "by"):
        grid.add_column(name, no_wrap=True)
    reported = learnt.fit.parameters
    for label, interval in learnt.parameters.items():
        open_floor = label.startswith("E") and "W-E0" in learnt.fit.codes
        ends = "not identified" if open_floor else f"[{interval.low:.4g}, {interval.high:.4g}]"
        whole = f"{reported[label]:.5g}" if label in reported else ""
        method = interval.method.split(", ")[-1].replace("t with", "t,")
        method = method.replace("degrees of freedom", "dof")
        # Rich would read the name of an arm in brackets as a style.
        grid.add_row(escape(label), whole, f"{interval.estimate:.5g}", escape(ends), method)
    return grid


def _quality(learnt: Learnt) -> Iterator[str]:
    fit = learnt.fit
    yield (
        f"objective {fit.objective:.10g} at delta {fit.delta:.3g}; sd of residuals "
        f"{100 * fit.sigma:.2g} %; {fit.starts_agreeing} of {fit.starts} starts agree; condition "
        f"{number(fit.condition, 0)}"
    )
    for warned in fit.warnings:
        yield f"{warned.code}: {warned.finding}"
    if learnt.backtest is not None:
        yield f"forecast error in back-tests: {learnt.backtest.words}"


def _family(rows: pd.DataFrame, by: tuple[str, ...]) -> Grid:
    choice = choose(rows, nested_family(by))
    grid = Grid("law", "parameters", "AICc", "BIC", "hold-out error", "status")
    for record in choice.table.to_dict("records"):
        mark = " (forecast)" * (record["law"] == choice.forecast)
        mark += " (description)" * (record["law"] == choice.description)
        numbers = [number(float(record[key]), 1) for key in ("AICc", "BIC")]
        error = f"{100 * record['hold_out']:.3g} %"
        parameters = number(float(record["parameters"]), 0)
        status = escape(str(record["status"]))
        grid.add_row(f"{record['law']}{mark}", parameters, *numbers, error, status)
    return grid


def _omnibus_words(test: OmnibusTest | Refusal) -> str:
    if isinstance(test, Refusal):
        return f"test that no arm differs: {test}"
    effects, rest = test.freedom
    return (
        f"test that no arm differs: p = {test.p:.2g} (F = {test.statistic:.3g} on {effects:.0f} "
        f"and {rest:.1f} degrees of freedom)"
    )


def _prediction(law: ScalingLaw, rows: pd.DataFrame, options: argparse.Namespace) -> str:
    try:
        size, tokens = (float(part) for part in options.at.split(","))
    except ValueError:
        raise ValueError(f"--at {options.at!r} is not of the form parameters,tokens") from None
    arms = rows[list(options.by)].drop_duplicates() if options.by else pd.DataFrame(index=[0])
    places = arms.assign(parameters=size, tokens=tokens).reset_index(drop=True)
    if "flops" in rows:
        places = places.assign(flops=six_nd(floats(places, "parameters"), floats(places, "tokens")))
    predicted = law.predict(places, allow=options.allow)
    return (
        str(predicted)
        if isinstance(predicted, Refusal)
        else places.join(predicted).to_string(index=False)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
