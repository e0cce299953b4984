"""Parts of the page that only some sweeps have: arms side by side, learning rates, tuning."""

from dataclasses import dataclass

import pandas as pd

from analysis.effects.leaderboard import arms_table, compare_arms
from analysis.effects.learning_rates import search_table
from analysis.figures.leaderboard_figures import draw_arms, draw_rates
from analysis.figures.report_figure import ReportFigure
from analysis.tables.run_table import Table
from analysis.validity.refusal import Refusal
from analysis.words.leaderboard import arm_lines, arms_shown
from analysis.words.learning_rates import search_lines, search_shown, tuning_sentence, tuning_table

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


def sections(table: Table, rate_search: Refusal | None) -> list[Section]:
    """The parts that this sweep has, in the order of the page.

    `rate_search` is that of the study: None unless the sweep is a search over learning rates.
    """
    parts = [_arms(table) if rate_search is None else _rates(table), _tuning(table)]
    return [each for each in parts if each is not None]


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


def _tuning(table: Table) -> Section | None:
    if not table.tuning:
        return None
    sentence = tuning_sentence(table.tuning)
    shown = tuning_table(table.tuning)
    return Section(
        name="tuning",
        title="Equal tuning?",
        text=sentence,
        plates=(),
        shown=shown,
        numbers=shown,
        note="The scale multiplies the rung's learning rate; evidence is what the sweep states.",
        lines=(sentence,) if sentence.startswith("Warning") else (),
        leads=False,
    )
