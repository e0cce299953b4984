"""The page of a report: the order of its answers, its tables, and how drawings are inlined."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.fitting.estimator import Fit
from analysis.report.answers import answers, laws_table, progress, refusals
from analysis.report.run_rows import HEADS, example_run, run_rows
from analysis.report.sections import Section
from analysis.study.findings import Findings
from analysis.study.study import FittedLaw, Study
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import WARNINGS
from analysis.words.numbers import bracketed, capital
from analysis.words.sentences import law_words, multiplier_sentence
from analysis.words.title import numbers_line, title_sentence

PAGE_SCALE = 1.53
"""Pixels per point of a drawing: the widest fills the page, and all have letters of one size."""
FIRST_FIGURE = "effects_by_size"
# Colours that follow the reader's light or dark page in the inlined drawings.
_PAGE_COLOURS = {
    **{colour: f"var(--arm-{place})" for place, colour in enumerate(panels.COLOURS)},
    panels.INK: "var(--ink)",
    panels.FAINT: "var(--faint)",
    panels.RULE: "var(--rule)",
    panels.PAPER: "var(--paper)",
}


# A plate's name -> its SVG for a wide page and for a narrow one.
Drawings = Mapping[str, tuple[str, str]]


def render(
    study: Study,
    sections: Sequence[Section],
    plates: Sequence[ReportFigure],
    drawings: Drawings,
    plan: Mapping,
    findings: Findings | None,
) -> str:
    """The whole page as HTML that needs nothing else."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    table = study.table
    laws = laws_table(study)
    return environment.get_template("report.html").render(
        name=table.name,
        headline=_headline(sections, findings),
        numbers=numbers_line(findings.headline) if findings else "",
        leading=[_part(each, drawings) for each in sections if each.leads],
        trailing=[_part(each, drawings) for each in sections if not each.leads],
        progress=progress(table),
        neutral_set=table.neutral_set,
        answers=answers(study, findings),
        reservations=_reservations(findings),
        refusals=refusals(study, findings),
        first=_drawn([each for each in plates if each.name == FIRST_FIGURE], drawings),
        plates=_drawn([each for each in plates if each.name != FIRST_FIGURE], drawings),
        colours=list(zip(panels.COLOURS, panels.DARK_COLOURS, strict=True)),
        nothing_drawn=_nothing_drawn(study),
        laws=_html(laws) if len(laws) else "",
        law_note=_law_note(study),
        law_warnings=_law_warnings(study),
        joint=_html(_joint_table(study.joint, study.alternatives)),
        joint_law=law_words(study.joint.law),
        family=_html(_family_shown(study)),
        multipliers=[
            multiplier_sentence(m) for m in study.multipliers if not isinstance(m, Refusal)
        ],
        multiplier_note=_multiplier_note(study),
        excluded=table.exclusions,
        run_heads=HEADS,
        run_rows=run_rows(table),
        folder=table.folder,
        example=example_run(table),
        plan=list(plan.items()),
        commits=", ".join(sorted({str(each) for each in table.rows["commit"].dropna()})),
    )


def _reservations(findings: Findings | None) -> list[dict[str, str]]:
    """The guards that fired: code, meaning, what was found, and what follows."""
    raised = findings.reservations if findings else ()
    return [
        {"code": each.code, "finding": each.finding, "meaning": capital(each.meaning),
         "action": each.action}
        for each in raised
    ]  # fmt: skip


def _part(section: Section, drawings: Drawings) -> dict[str, object]:
    return {
        "name": section.name,
        "title": section.title,
        "text": section.text,
        "plates": _drawn(section.plates, drawings),
        "table": _html(section.shown) if len(section.shown) else "",
        "note": section.note,
    }


def _drawn(plates: Sequence[ReportFigure], drawings: Drawings) -> list[dict[str, object]]:
    return [
        {
            "name": each.name,
            "title": each.title,
            "caption": each.caption,
            "wide": Markup(_inline(drawings[each.name][0], each.name)),
            "narrow": Markup(_inline(drawings[each.name][1], f"{each.name}-narrow")),
        }
        for each in plates
    ]


def _nothing_drawn(study: Study) -> str:
    if len(study.points.rows):
        return "No figure of effects or laws is drawn; see above for what was refused."
    return "No run has finished yet, so there is nothing to draw."


def _headline(sections: Sequence[Section], findings: Findings | None) -> str:
    first = [plate.title for each in sections if each.leads for plate in each.plates[:1]]
    if first:
        return first[0]
    if findings is None:
        return "Data against architecture: not answered"
    return title_sentence(findings.headline)


def _joint_table(joint: FittedLaw, alternatives: pd.DataFrame) -> pd.DataFrame:
    others = alternatives.pivot(index="parameter", columns="estimator", values="value")
    columns = [name for name in others.columns if not name.startswith("default")]
    records = [
        {"parameter": name, "value and 95 % interval": bracketed(interval)}
        | {column: f"{others.loc[name, column]:.4g}" for column in columns}
        for name, interval in joint.intervals.items()
    ]
    return pd.DataFrame(records)


def _family_shown(study: Study) -> pd.DataFrame:
    values = study.family["AICc"].to_numpy(dtype=np.float64)
    best = np.nanmin(values, initial=np.inf)
    excess = [f"{value - best:.1f}" if math.isfinite(value) else "refused" for value in values]
    count = [f"{value:.0f}" if math.isfinite(value) else "" for value in study.family["parameters"]]
    shown = study.family.drop(columns="AICc").assign(parameters=count)
    return shown.assign(**{"AICc above the best": excess})


def _law_note(study: Study) -> str:
    shared = law_words(study.joint.law)
    methods = sorted({law.replicates.method for law in study.laws if law.replicates})
    return (
        f"Brackets: 95 % intervals, by {'; '.join(methods)}. The joint law, fitted to all cells at "
        f"once, is a {shared}. alpha and beta are the exponents of N and D; the standard deviation "
        "of the residuals is robust, without an interval. The intervals assume that the law "
        "holds. The coefficients A and B are terms at N = D = 1, far outside the data: compare "
        "predictions, not coefficients."
    )


def _law_warnings(study: Study) -> list[str]:
    """One line per warning code: what it means, and where it was raised."""
    by_code: dict[str, list[str]] = {}
    for law in study.laws:
        if isinstance(law.fit, Fit):
            for warned in law.fit.warnings:
                place = f"{law.part}, {law.evaluation_set}"
                by_code.setdefault(warned.code, []).append(f"{place}: {warned.finding}")
    return [f"{code}, {WARNINGS[code][0]}. {'; '.join(each)}." for code, each in by_code.items()]


def _multiplier_note(study: Study) -> str:
    known = [each for each in study.multipliers if not isinstance(each, Refusal)]
    if not known:
        return ""
    return (
        f"From the joint law ({law_words(study.joint.law)}); intervals by {known[0].factor.method}."
    )


def _inline(svg: str, name: str) -> str:
    """A drawing for the page: no prolog, no metadata, the page's colours, ids of its own."""
    # Nobody sees a hundredth of a point; without these digits a page is much smaller.
    body = re.sub(r'\b(?:d|x|y)="[^"]*"', _shorter, svg[svg.index("<svg") :])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for colour, variable in _PAGE_COLOURS.items():
        body = body.replace(colour, variable)
    width = float(re.search(r'width="([\d.]+)pt"', body)[1])  # type: ignore[index]
    body = body.replace("<svg", f'<svg style="max-width: {width * PAGE_SCALE:.0f}px"', 1)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    return body.replace('href="#', f'href="#{name}-')


def _shorter(attribute: re.Match) -> str:
    """An attribute of coordinates to two decimals, on one line."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]).replace(" \n", " ")


def _html(frame: pd.DataFrame) -> Markup:
    return Markup(frame.to_html(index=False, border=0, escape=True, na_rep="", justify="left"))
