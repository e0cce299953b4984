"""Parts of the page that only some sweeps have: arms side by side, learning rates, tuning."""

from dataclasses import dataclass

import pandas as pd

from analysis.effects.leaderboard import arms_table, compare_arms
from analysis.effects.learning_rates import search_table
from analysis.effects.recipes import recipe_effects
from analysis.figures.leaderboard_figures import draw_arms, draw_rates
from analysis.figures.recipe_figures import draw_recipes
from analysis.figures.report_figure import ReportFigure
from analysis.study.self_checks import self_checks
from analysis.study.study import Study
from analysis.tables.run_table import Table
from analysis.words.leaderboard import arm_lines, arms_shown
from analysis.words.learning_rates import search_lines, search_shown, tuning_sentence, tuning_table
from analysis.words.recipes import recipes_shown
from analysis.words.tuning import (
    fair_tuning,
    fairness_sentence,
    gaps_numbers,
    gaps_sentence,
    gaps_shown,
)

_ARMS_NOTE = (
    "Differences: the arm's loss minus the baseline's, negative where the arm is better. An arm "
    "'beats' a baseline if the 95 % interval of the difference lies below zero, so by more than "
    "the seed noise. Tokens/s: median over a run's steps, measured while runs shared the machine; "
    "not a ranking of speed. State: bytes that decoding one sequence keeps at that context length."
)
_RATES_NOTE = (
    "Factor on the rule: 1 is the rung's own rate. Optimum: 'interior' if worse trials lie on both "
    "sides of the best one, 'not bracketed' if it lies at the edge. Refined: the lowest point of "
    "a parabola in log2 of the rate through the best trial and its two neighbours. Sensitivity "
    "(Wortsman et al. 2023): mean over the tried rates of the loss, capped at that of a uniform "
    "guess, less the best loss; a diverged trial counts as a uniform guess."
)
_TUNING_NOTE = (
    "Beside the hash that shows that arms read the same samples, this shows that they were tuned "
    "alike: which search each rate comes from, whether this study lies inside the sizes, budgets "
    "and batches that were searched, what the rule costs at a size that its fit did not see, and "
    "the worst verdict of this study's own probes. The scale multiplies the rung's learning rate."
)
_PROBES_NOTE = (
    "Each arm was also trained at other rates and batches, at the longest horizon, on the first "
    "corpus and seed. 'bracketed': both neighbours are worse beyond noise; 'flat within noise': "
    "none is better beyond it; 'off, optimum inside': one is, and the loss is lowest among the "
    "tried; 'not bracketed': it may be lower still beyond them. Loss left: of the run in use above "
    "the lowest point of a parabola in log2 of the factor, less what the lowest of noisy runs "
    "flatters; 95 % interval from a standard deviation between seeds of {noise} and the documents "
    "on which the runs differ. A diverged probe is worse than any loss. The gaps of rate and batch "
    "add up; between probed sizes they are interpolated in ln N, beyond them held, and taken as "
    "equal on all corpora and horizons."
)


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        name: of its table's file.
        text: what stands above the figure.
        shown: the table as a reader sees it.
        numbers: the same in numbers, for a file.
        lines: the same for a terminal.
        leads: whether it stands before the answers on data and architecture.
    """

    name: str
    title: str
    text: str
    plates: tuple[ReportFigure, ...]
    shown: pd.DataFrame
    numbers: pd.DataFrame
    note: str
    lines: tuple[str, ...]
    leads: bool


def sections(study: Study) -> list[Section]:
    """The parts that this sweep has, in the order of the page."""
    table = study.table
    first = _arms(table) if study.rate_search is None else _rates(table)
    parts = [first, _recipes(table), _checks(study), _tuning(study), _probes(study)]
    return [each for each in parts if each is not None]


def _checks(study: Study) -> Section | None:
    checks = self_checks(study)
    if not checks:
        return None
    failed = [each for each in checks if each.passed is False]
    text = f"{sum(each.passed is True for each in checks)} of {len(checks)} checks passed."
    shown = pd.DataFrame(
        {
            "check": [each.name for each in checks],
            "verdict": [each.verdict for each in checks],
            "what was found": [each.detail for each in checks],
        }
    )
    numbers = shown.assign(passed=[each.passed for each in checks])
    lines = tuple(f"Check failed: {each.name}: {each.detail}" for each in failed)
    return Section(
        name="checks",
        title="What a reader would check",
        text=text,
        plates=(),
        shown=shown,
        numbers=numbers,
        note="On the neutral set. A failed check does not change a number: it says what to doubt.",
        lines=lines,
        leads=False,
    )


def _arms(table: Table) -> Section | None:
    comparisons = compare_arms(table)
    if not comparisons:
        return None
    lines = tuple(arm_lines(comparisons))
    return Section(
        name="arms",
        title="Architectures side by side",
        text="",
        plates=tuple(draw_arms(comparisons, table.neutral_set)),
        shown=arms_shown(comparisons),
        numbers=arms_table(comparisons),
        note=_ARMS_NOTE,
        lines=(*lines, ""),
        leads=True,
    )


def _recipes(table: Table) -> Section | None:
    effects = recipe_effects(table)
    if not len(effects):
        return None
    plates = draw_recipes(effects, table.neutral_set)
    return Section(
        name="recipes",
        title="Training recipes",
        text="",
        plates=tuple(plates),
        shown=recipes_shown(effects),
        numbers=effects,
        note="Percent of the loss under the sweep's own recipe, negative where the recipe is "
        "better.",
        lines=(f"{plates[0].title}.",),
        leads=True,
    )


def _rates(table: Table) -> Section:
    searched = search_table(table)
    lines = tuple(search_lines(table))
    return Section(
        name="rates",
        title="Learning rates",
        text=lines[-1],
        plates=tuple(draw_rates(table)),
        shown=search_shown(searched),
        numbers=searched,
        note=_RATES_NOTE,
        lines=(*lines, ""),
        leads=True,
    )


def _tuning(study: Study) -> Section | None:
    table, gaps = study.table, study.answer.gaps
    if not table.tuning:
        return None
    sentence = tuning_sentence(table.tuning)
    scales = tuning_table(table.tuning)
    shown = fair_tuning(table, gaps).assign(
        **{"learning rate scale": scales.set_index("architecture")["learning rate scale"]
           .reindex(table.levels("architecture")).fillna("").to_list()}
    )  # fmt: skip
    return Section(
        name="tuning",
        title="Equal tuning?",
        text=f"{sentence} {fairness_sentence(table)}",
        plates=(),
        shown=shown,
        numbers=shown,
        note=_TUNING_NOTE,
        lines=(sentence,) if sentence.startswith("Warning") else (),
        leads=False,
    )


def _probes(study: Study) -> Section | None:
    gaps = study.answer.gaps
    if not gaps:
        return None
    sentence = gaps_sentence(gaps)
    return Section(
        name="probes",
        title="What each arm's rate and batch leave on the table",
        text=sentence,
        plates=(),
        shown=gaps_shown(gaps),
        numbers=gaps_numbers(gaps),
        note=_PROBES_NOTE.format(noise=f"{100 * study.answer.probe_sd:.2g} %"),
        lines=() if sentence.startswith("At every") else (sentence,),
        leads=False,
    )
