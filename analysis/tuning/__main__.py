"""Rules of the learning rate from searches, and what they cost at a rung that they did not see.

python -m analysis.tuning runs/tuning
python -m analysis.tuning runs/b512 runs/b1024 --unseen 160k --out runs/tuning/rules

Reads one or more sweep folders; trials of the same cell may lie in several. Prints each rule with
its errors, the regret of the other rungs' rule at every rung, what sharing a trunk costs, and the
cells whose best rate is at the edge. Writes rules.yaml (for sweeps/architectures/), tables and a
figure. Exits with 2 if the folders cannot be read or do not determine a rule.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from rich.console import Console

from analysis.effects.learning_rates import one_sided, rate_trials, rungs_of
from analysis.effects.seed_noise import ASSUMED_SEED_SD
from analysis.effects.tuning_regret import regrets, sharing_costs
from analysis.effects.tuning_rule import fit_rules, fitted_trials, own_optima
from analysis.figures.tuning_figures import draw_search
from analysis.tables.frames import keep, strings
from analysis.tables.sweep_folder import load
from analysis.words.tuning_rules import (
    left_out_lines,
    open_lines,
    regret_lines,
    rule_entry,
    rule_lines,
    sharing_lines,
)


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(words)
    console = Console(soft_wrap=True)
    try:
        lines = _answer(options)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="sweep folders of the search")
    parser.add_argument(
        "--unseen", help="rung that the rule is fitted without and judged at (default: the largest)"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=ASSUMED_SEED_SD,
        help="sd of ln L between seeds (default: 0.006)",
    )
    parser.add_argument("--name", help="name of the search in the YAML (default: the folders')")
    parser.add_argument("--out", type=Path, help="where files go (default: FOLDER/rules)")
    return parser


def _answer(options: argparse.Namespace) -> list[str]:
    searched = read_trials(options.folders)
    left_out = one_sided(searched)
    trials = keep(searched, ~np.isin(strings(searched, "architecture"), list(left_out)))
    if not len(trials):
        raise ValueError("\n".join(left_out_lines(left_out)))
    rungs = rungs_of(trials)
    unseen = options.unseen or rungs[-1]
    # Every rung's regret is of a rule without it.
    costs = pd.concat(
        [regrets(trials, rung, options.noise, 0) for rung in dict.fromkeys([*rungs, unseen])],
        ignore_index=True,
    )
    rules = fit_rules(trials, options.noise, 0)
    without = fit_rules(keep(trials, strings(trials, "rung") != unseen), options.noise, 0)
    own = own_optima(fitted_trials(trials), options.noise, 0).cells
    sharing = sharing_costs(trials, options.noise, 0)
    name = options.name or "+".join(folder.name for folder in options.folders)
    out = options.out or options.folders[0] / "rules"
    out.mkdir(parents=True, exist_ok=True)
    entries = {
        arm: {"tuning": rule_entry(rules, arm, name, keep(costs, costs["rung"] == unseen))}
        for arm in rules.architectures
    }
    (out / "rules.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    searched.to_csv(out / "trials.csv", index=False, float_format="%.8g")
    costs.to_csv(out / "regret.csv", index=False, float_format="%.6g")
    sharing.to_csv(out / "sharing.csv", index=False, float_format="%.6g")
    draw_search(trials, rules, own).save(out)
    return [
        *left_out_lines(left_out),
        f"{len(trials)} trials; the rules:",
        *rule_lines(rules),
        f"The same without {unseen}, which they are judged at:",
        *rule_lines(without),
        *regret_lines(costs, unseen),
        *sharing_lines(sharing),
        *open_lines(searched),
        f"written: {out}/rules.yaml, trials.csv, regret.csv, sharing.csv, rate_search.png",
    ]


def read_trials(folders: list[Path]) -> pd.DataFrame:
    """All trials of the folders, each run once.

    Raises:
        ValueError: a folder is no sweep, its text is scored elsewhere, or no trial has ended.
    """
    tables = [load(folder) for folder in folders]
    measured = {table.neutral_set for table in tables}
    if len(measured) > 1:
        raise ValueError(
            f"the folders compare losses on different sets, {', '.join(sorted(measured))}; name "
            "folders with one neutral set"
        )
    evaluations = {
        str(each) for table in tables for each in table.rows["evaluation_id"].dropna().unique()
    }
    if len(evaluations) > 1:
        raise ValueError(
            f"the folders measured losses in {len(evaluations)} ways (evaluation_id "
            f"{', '.join(sorted(evaluations))}); name folders that were evaluated alike"
        )
    trials = pd.concat([rate_trials(table) for table in tables], ignore_index=True)
    if not len(trials):
        raise ValueError("no trial has ended yet; run the sweeps first")
    once = ~trials["run_id"].duplicated().to_numpy(dtype=bool)
    return keep(trials, once & np.isfinite(trials["batch_tokens"].to_numpy(dtype=float)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
