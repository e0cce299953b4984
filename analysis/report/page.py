"""The page of a report: the order of its answers, its tables, and how drawings are inlined."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis.effects.contrasts import Arm, Contrast
from analysis.effects.learning_rates import mixed_rates
from analysis.figures import panels as figures
from analysis.figures.point_figures import Plate
from analysis.fitting.estimator import WARNINGS, Fit
from analysis.report.sections import Section
from analysis.study.findings import Findings
from analysis.study.study import FittedLaw, Study
from analysis.tables.frames import where
from analysis.tables.run_table import FLOP_CONVENTIONS, Table
from analysis.validity.checks import MEANINGS
from analysis.validity.refusal import Refusal
from analysis.words.sentences import (
    bracketed,
    capital,
    contrast_note,
    contrast_sentence,
    counting_sentence,
    detectable_sentence,
    exponent_words,
    headline_sentence,
    interaction_sentence,
    largest_effect,
    law_words,
    multiplier_sentence,
    ratio_sentence,
    with_unit,
)

PAGE_SCALE = 1.53
"""Pixels per point of a drawing: the widest fills the page, and all have letters of one size."""
NO_OPTIMUM = Refusal(
    "R-REACH",
    "the fitted law has no best size near what was run, for the first arm",
    "add sizes and horizons on both sides of the frontier",
)
# Colours that follow the reader's light or dark page in the inlined drawings.
_PAGE_COLOURS = {
    figures.INK: "var(--ink)",
    figures.FAINT: "var(--faint)",
    figures.RULE: "var(--rule)",
    figures.PAPER: "var(--paper)",
}


def render(
    study: Study,
    sections: Sequence[Section],
    plates: Sequence[Plate],
    drawings: Mapping[str, str],
    plan: Mapping,
    found: Findings | None,
) -> str:
    """The whole page as HTML that needs nothing else; `drawings` holds SVG by a plate's name."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    table = study.table
    laws = laws_table(study)
    return environment.get_template("report.html").render(
        name=table.name,
        headline=_headline(study, sections),
        leading=[_part(each, drawings) for each in sections if each.leads],
        trailing=[_part(each, drawings) for each in sections if not each.leads],
        progress=progress(table),
        neutral_set=table.neutral_set,
        answers=answers(study, found),
        reservations=_reservations(found),
        refusals=refusals(study, found),
        plates=_drawn(plates, drawings),
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
        runs=_html(_runs_shown(table)),
        plan=list(plan.items()),
        commits=", ".join(sorted({str(each) for each in table.rows["commit"].dropna()})),
    )


def _reservations(found: Findings | None) -> list[dict[str, str]]:
    """The guards that fired: code, meaning, what was found, and what follows."""
    raised = found.reservations if found else ()
    return [
        {"code": each.code, "finding": each.finding, "meaning": capital(MEANINGS[each.code][0]),
         "action": MEANINGS[each.code][1]}
        for each in raised
    ]  # fmt: skip


def answers(study: Study, found: Findings | None) -> list[tuple[str, str, str]]:
    """What the page says first: a lead, a sentence with its interval, and how it was made."""
    answer, mixed = study.answer, mixed_rates(study.table)
    if mixed is not None:
        text = f"Not answered: {mixed.reason}. To answer it, {mixed.remedy}."
        return [("Data against architecture", text, "")]
    told = [("In one line", headline_sentence(found.headline), "")] if found else []
    for factor, contrasts in (("corpus", answer.corpus), ("architecture", answer.architecture)):
        for contrast in contrasts:
            text = contrast_sentence(contrast, answer.detectable[factor])
            told.append((f"{factor.capitalize()} effect", text, contrast_note(contrast)))
    told.append(("Smallest difference this study finds", detectable_sentence(answer), ""))
    for arm in answer.arms:
        told += _arm_answers(arm, len(answer.arms) > 1)
    return [each for each in dict.fromkeys(told) if each[1]]


def _arm_answers(arm: Arm, named: bool) -> list[tuple[str, str, str]]:
    contrast = arm.contrast
    if isinstance(contrast, Refusal):
        return [("One against the other", ratio_sentence(arm), "")]
    name = f" ({contrast.other})" if named else ""
    counting = ("Equal compute instead of equal tokens" + name, counting_sentence(arm))
    return [
        (f"Between corpora{name}", interaction_sentence(arm), _method(arm.interaction)),
        (f"One against the other{name}", ratio_sentence(arm), _method(arm.ratio)),
        (*counting, _method(arm.flops["flops"])),
    ]


def refusals(study: Study, found: Findings | None) -> list[tuple[str, Refusal]]:
    """Every answer that was refused; equal reasons are listed once."""
    answer = study.answer
    named: list[tuple[str, object]] = [
        *(("Corpus effect", each) for each in answer.corpus),
        *(("Architecture effect", each) for each in answer.architecture),
        *(each for arm in answer.arms for each in _parts(arm)),
        ("Noise between seeds", answer.noise),
        *((f"{law_words(law.law)} of {law.part}", law.fit) for law in study.laws),
        *(("Multiplier", each) for each in study.multipliers),
        *(_of_findings(found) if found else ()),
    ]
    by_text: dict[str, tuple[list[str], Refusal]] = {}
    for subject, value in named:
        if isinstance(value, Refusal):
            subjects = by_text.setdefault(str(value), ([], value))[0]
            subjects += [subject] if subject not in subjects else []
    return [("; ".join(subjects), refusal) for subjects, refusal in by_text.values()]


def _of_findings(found: Findings) -> list[tuple[str, object]]:
    head = found.headline
    named: list[tuple[str, object]] = [("Ratio in one line", head.ratio)]
    named += [(f"Worth of the {name} in compute", each) for name, each in head.multipliers.items()]
    named += [(f"Variance shares on {name}", each) for name, each in found.shares.items()]
    named += [(f"Loss to loss on {name}", each) for name, each in found.transfers.items()]
    if found.shown is not None and not len(found.counting):
        named.append(("Exponent of the best size by counting", NO_OPTIMUM))
    return named


def _parts(arm: Arm) -> list[tuple[str, object]]:
    if isinstance(arm.contrast, Refusal):
        return []
    name = f" ({arm.contrast.other})"
    flops = [
        (f"Effect at equal compute{name}, {FLOP_CONVENTIONS[key]}", each)
        for key, each in arm.flops.items()
    ]
    return [(f"Interaction{name}", arm.interaction), (f"Ratio{name}", arm.ratio), *flops]


def progress(table: Table) -> str:
    """How far the sweep is."""
    counts = table.runs["status"].value_counts()
    others = [f"{count} {state}" for state, count in counts.items() if state != "done"]
    done = len(where(table.runs, "status", "done"))
    text = f"{done} of {len(table.runs)} runs finished"
    return f"{text} ({', '.join(others)})" if others else text


def laws_table(study: Study) -> pd.DataFrame:
    """Exponents and floors with their intervals, the joint law first."""
    records = []
    for law in study.laws:
        if isinstance(law.fit, Refusal):
            continue
        kind = "joint" if law is study.joint else law.law.name
        record = {"law": kind, "cell": law.part, "evaluated on": law.evaluation_set}
        for name in ("alpha", "beta", "gamma", "E"):
            interval = law.intervals.get(name)
            hidden = name == "E" and "W-E0" in law.fit.codes
            text = "" if interval is None else exponent_words(interval)
            record[name] = "not identified" if hidden else text
        record |= {
            "points": str(len(law.fit.rows)),
            "sd of ln L": f"{100 * law.fit.sigma:.2g} %",
            "status": law.fit.status,
        }
        records.append(record)
    frame = pd.DataFrame(records)
    return frame.loc[:, (frame != "").any()] if len(frame) else frame


def _part(section: Section, drawings: Mapping[str, str]) -> dict[str, object]:
    return {
        "name": section.name,
        "title": section.title,
        "text": section.text,
        "plates": _drawn(section.plates, drawings),
        "table": _html(section.shown) if len(section.shown) else "",
        "note": section.note,
    }


def _drawn(plates: Sequence[Plate], drawings: Mapping[str, str]) -> list[dict[str, object]]:
    return [
        {
            "name": each.name,
            "title": each.title,
            "caption": each.caption,
            "svg": Markup(_inline(drawings[each.name], each.name)),
        }
        for each in plates
    ]


def _nothing_drawn(study: Study) -> str:
    if len(study.points.rows):
        return "No figure of effects or laws is drawn; see above for what was refused."
    return "No run has finished yet, so there is nothing to draw."


def _headline(study: Study, sections: Sequence[Section]) -> str:
    first = [plate.title for each in sections if each.leads for plate in each.plates[:1]]
    if first:
        return first[0]
    answer = study.answer
    parts = [
        f"{name} {largest_effect(found)}"
        for name, found in (("corpus", answer.corpus), ("architecture", answer.architecture))
        if any(isinstance(each, Contrast) for each in found)
    ]
    if not parts:
        return "Data against architecture: not answered yet"
    text = f"{' and '.join(parts)} of loss on {study.table.neutral_set}"
    return text[:1].upper() + text[1:]


def _method(found: object) -> str:
    if isinstance(found, Contrast):
        return f"{len(found.pairs)} interpolated pairs; {found.effect.method}."
    method = getattr(found, "method", "")
    return f"{method}." if method else ""


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


def _runs_shown(table: Table) -> pd.DataFrame:
    shown = table.runs.drop(
        columns=["vocab_size", "tokens_per_second", "device", "flops_per_device_second"]
    )
    shown["learning_rate"] = [f"{each:.3g}" if each > 0 else "" for each in shown["learning_rate"]]
    for name in ("parameters", "horizon_tokens", "tokens"):
        shown[name] = [with_unit(value) if value > 0 else "" for value in shown[name]]
    for name in ("architecture", "corpus", "rung", "seed"):
        shown[name] = ["" if pd.isna(value) else str(value) for value in shown[name]]
    return shown.rename(
        columns={"horizon_tokens": "horizon", "tokens": "seen", "learning_rate": "rate"}
    )


def _law_note(study: Study) -> str:
    shared = law_words(study.joint.law)
    methods = sorted({law.replicates.method for law in study.laws if law.replicates})
    return (
        f"Brackets: 95 % intervals, by {'; '.join(methods)}. The joint law, fitted to all cells at "
        f"once, is a {shared}. alpha and beta are the exponents of N and D; the standard deviation "
        "of the residuals is robust and without interval. The intervals suppose that the law "
        "holds. The coefficients A and B are terms at N = D = 1, far outside the data: compare "
        "predictions, not coefficients."
    )


def _law_warnings(study: Study) -> list[str]:
    """One line per warning code: what it means, and where it was raised."""
    found: dict[str, list[str]] = {}
    for law in study.laws:
        if isinstance(law.fit, Fit):
            for warned in law.fit.warnings:
                place = f"{law.part}, {law.evaluation_set}"
                found.setdefault(warned.code, []).append(f"{place}: {warned.finding}")
    return [f"{code}, {WARNINGS[code]}. {'; '.join(each)}." for code, each in found.items()]


def _multiplier_note(study: Study) -> str:
    found = [each for each in study.multipliers if not isinstance(each, Refusal)]
    if not found:
        return ""
    return (
        f"From the joint law ({law_words(study.joint.law)}); intervals by {found[0].factor.method}."
    )


def _inline(svg: str, name: str) -> str:
    """A drawing for the page: no prolog, no metadata, the page's colours, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for colour, variable in _PAGE_COLOURS.items():
        body = body.replace(colour, variable)
    width = float(re.search(r'width="([\d.]+)pt"', body)[1])  # type: ignore[index]
    body = body.replace("<svg", f'<svg style="max-width: {width * PAGE_SCALE:.0f}px"', 1)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    return body.replace('href="#', f'href="#{name}-')


def _html(frame: pd.DataFrame) -> Markup:
    return Markup(frame.to_html(index=False, border=0, escape=True, na_rep="", justify="left"))
