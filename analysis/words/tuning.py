"""Tables and sentences on how fairly the arms of a study are tuned: its probes, and its rules."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.effects.answer import Arm
from analysis.effects.tuning import (
    BRACKETED,
    DIRECTIONS,
    EDGE,
    FLAT,
    INSIDE,
    ONE_SIDED,
    UNCHECKED,
    Gap,
)
from analysis.tables.frames import floats
from analysis.tables.run_table import Table, has_evidence
from analysis.validity.refusal import Refusal
from analysis.words.numbers import bracketed, with_unit
from analysis.words.sentences import short_effect

WORST_FIRST = (EDGE, UNCHECKED, ONE_SIDED, INSIDE, FLAT, BRACKETED)
SLACK = 1.05
"""Sizes and budgets this close to a searched range count as inside: shapes match within 1 %."""
RANGES = {"parameters": "nominal_parameters", "tokens": "tokens", "batch_tokens": "batch_tokens"}
"""What a rule says was searched -> the column of the study's rows that must lie within."""


def gap_words(gap: Gap) -> str:
    """The loss that a choice leaves, in percent."""
    percent = gap.gap.mapped(lambda value: 100 * math.expm1(value) if value < 700 else math.inf)
    if gap.verdict == EDGE:
        return f"at least {max(percent.estimate, 0.0):.2g} %"
    if gap.verdict == UNCHECKED:
        return "unknown"
    return f"{bracketed(percent)} %"


def gaps_shown(gaps: Sequence[Gap]) -> pd.DataFrame:
    """The table of tuning probes as a reader sees it."""
    return pd.DataFrame(
        {
            "architecture": each.architecture,
            "rung": each.rung,
            "choice": each.direction,
            "verdict": each.verdict,
            "loss left": gap_words(each),
            "lowest at": f"{each.best_factor:.2g} x" if each.verdict != UNCHECKED else "",
            "to settle it, train at": ", ".join(f"{factor:g} x" for factor in each.missing),
        }
        for each in gaps
    )


def gaps_numbers(gaps: Sequence[Gap]) -> pd.DataFrame:
    """The same in numbers; gaps are of ln L, without an upper end where not bracketed."""
    return pd.DataFrame(
        {
            "architecture": each.architecture, "rung": each.rung, "choice": each.direction,
            "verdict": each.verdict, "gap": each.gap.estimate, "low": each.gap.low,
            "high": each.gap.high if math.isfinite(each.gap.high) else np.nan,
            "best_factor": each.best_factor, "probes": each.probes,
        }
        for each in gaps
    )  # fmt: skip


def gaps_sentence(gaps: Sequence[Gap]) -> str:
    """What the probes found, the worst first; where all is well, that no more loss can be had."""
    bad = [each for each in gaps if each.verdict in (EDGE, INSIDE, ONE_SIDED, UNCHECKED)]
    if not bad:
        most = max(each.gap.high for each in gaps)
        return (
            "At every probed size each arm's rate and batch are bracketed by worse ones or equal "
            f"to them within noise; each choice leaves at most {100 * math.expm1(most):.2g} % of "
            "loss (95 %)."
        )
    parts = []
    for verdict, words in (
        (EDGE, "not bracketed"),
        (INSIDE, "off, and corrected for"),
        (ONE_SIDED, "no worse than the one side that was tried"),
        (UNCHECKED, "not checked, as a probe has no loss yet"),
    ):
        names = [
            f"the {each.direction} of {each.architecture} at {each.rung}"
            for each in bad
            if each.verdict == verdict
        ]
        if names:
            parts.append(f"{words}: {', '.join(names)}")
    return f"Tuning probes: {'; '.join(parts)}."


def tuned_sentence(arm: Arm) -> str:
    """The effect with both arms at their best rate and batch; empty where probes change nothing."""
    tuned, measured = arm.tuned, arm.contrast
    if isinstance(measured, Refusal) or tuned is measured:
        return ""
    if isinstance(tuned, Refusal):
        return f"Not answered: {tuned.reason}. To answer it, {tuned.remedy}."
    change = f"{tuned.other} instead of {tuned.baseline}"
    if tuned.open_ended:
        return (
            f"With both arms at the best that was tried, {change} changes loss by "
            f"{short_effect(tuned)}; an arm is not bracketed, so that the effect has no limit on "
            "one side."
        )
    if tuned.effect.estimate == measured.effect.estimate:
        return ""
    return (
        f"With both arms at their best rate and batch, {change} changes loss by "
        f"{short_effect(tuned)}; at those in use, by {short_effect(measured)}."
    )


def fair_tuning(table: Table, gaps: Sequence[Gap]) -> pd.DataFrame:
    """The certificate of fair tuning: a row per arm, the same questions of each."""
    records = []
    for name in table.levels("architecture"):
        entry = table.tuning.get(name) or {}
        rule = entry.get("rule")
        mine = [each for each in gaps if each.architecture == name]
        record = {"architecture": name, "searched by": _search(entry)}
        record["this study lies"] = _place(table, name, rule) if isinstance(rule, dict) else ""
        record["regret at an unseen rung"] = _regret(rule) if isinstance(rule, dict) else ""
        for direction in DIRECTIONS:
            verdicts = {each.verdict for each in mine if each.direction == direction}
            worst = [each for each in WORST_FIRST if each in verdicts]
            record[f"{direction} in use"] = worst[0] if worst else "not probed"
        records.append(record)
    return pd.DataFrame(records)


def fairness_sentence(table: Table) -> str:
    """Whether all arms had equal trials, an equal grid and an equal rule of selection."""
    names = table.levels("architecture")
    rules = {name: (table.tuning.get(name) or {}).get("rule") for name in names}
    searches = {
        str(rule.get("search")) if isinstance(rule, dict) else "" for rule in rules.values()
    }
    if searches == {""} or not names:
        return (
            "Equal trials cannot be shown: no architecture's learning rate comes from a rule that "
            "stands as data in its file."
        )
    if len(searches) == 1:
        return (
            f"Equal trials, equal grid, equal selection: every arm's rule comes from the one "
            f"search {searches.pop()}, which tries the same factors for each, by the same fit."
        )
    bare = [name for name, rule in rules.items() if not isinstance(rule, dict)]
    if bare:
        return f"Warning: unequal tuning. No rule stands as data for {', '.join(bare)}."
    return (
        f"Warning: the arms come from different searches ({', '.join(sorted(searches))}), whose "
        "trials and grids may differ."
    )


def _search(entry: dict) -> str:
    rule = entry.get("rule")
    if isinstance(rule, dict):
        return str(rule.get("search", "not named"))
    return str(entry["evidence"]) if has_evidence(entry) else "none stated"


def _regret(rule: dict) -> str:
    regret = rule.get("regret")
    if not isinstance(regret, dict):
        return "not measured"
    return (
        f"{regret.get('percent')} [{regret.get('low')}, {regret.get('high')}] % at "
        f"{regret.get('rung')}"
    )


def _place(table: Table, name: str, rule: dict) -> str:
    """Whether the sizes, budgets and batches of an arm lie within what was searched."""
    rows = table.rows.loc[(table.rows["architecture"] == name) & (table.rows["decayed"] == True)]  # noqa: E712
    outside = []
    for key, column in RANGES.items():
        searched = rule.get(key)
        if not isinstance(searched, list | tuple) or len(searched) != 2 or not len(rows):
            continue
        low, high = (float(each) for each in searched)
        least, most = float(floats(rows, column).min()), float(floats(rows, column).max())
        if least < low / SLACK or most > high * SLACK:
            outside.append(
                f"{key.replace('_', ' ')} {with_unit(least)} to {with_unit(most)} (searched "
                f"{with_unit(low)} to {with_unit(high)})"
            )
    return f"outside the search: {'; '.join(outside)}" if outside else "inside the search"
