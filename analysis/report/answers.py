"""The rows of the page's tables: answers, refusals, laws, progress."""

import pandas as pd

from analysis.effects.answer import Arm
from analysis.effects.contrasts import Contrast
from analysis.study.findings import Findings
from analysis.study.study import Study
from analysis.tables.frames import where
from analysis.tables.run_table import FLOP_CONVENTIONS, Table
from analysis.validity.refusal import Refusal
from analysis.words.machine_use import use_sentence
from analysis.words.sentences import (
    contrast_note,
    contrast_sentence,
    counting_sentence,
    detectable_sentence,
    evaluation_sentence,
    exponent_words,
    headline_sentence,
    interaction_sentence,
    law_words,
    ratio_sentence,
)
from analysis.words.tuning import tuned_sentence

NO_OPTIMUM = Refusal(
    "R-REACH",
    "the fitted law has no best size near what was run, for the first arm",
    "add sizes and horizons on both sides of the frontier",
)


def answers(study: Study, findings: Findings | None) -> list[tuple[str, str, str]]:
    """What the page says first: a lead, a sentence with its interval, and how it was made."""
    answer, mixed = study.answer, study.rate_search
    if mixed is not None:
        text = f"Not answered: {mixed.reason}. To answer it, {mixed.remedy}."
        return [("Data against architecture", text, "")]
    rows = [("Summary", headline_sentence(findings.headline), "")] if findings else []
    for factor, contrasts in (("corpus", answer.corpus), ("architecture", answer.architecture)):
        for contrast in contrasts:
            text = contrast_sentence(contrast, answer.detectable[factor])
            rows.append((f"{factor.capitalize()} effect", text, contrast_note(contrast)))
    for arm in answer.arms:
        named = f" ({arm.contrast.other})" if isinstance(arm.contrast, Contrast) else ""
        lead = "Architecture effect, both arms tuned" + named * (len(answer.arms) > 1)
        rows.append(
            (
                lead,
                tuned_sentence(arm),
                _method(arm.tuned.effect) if isinstance(arm.tuned, Contrast) else "",
            )
        )
    rows.append(("Smallest difference this study can detect", detectable_sentence(answer), ""))
    for arm in answer.arms:
        rows += _arm_answers(arm, len(answer.arms) > 1)
    rows.append(("Evaluation set", evaluation_sentence(study.points), ""))
    rows.append(("Use of the machine", use_sentence(study.table), "Of matrix products alone."))
    return [each for each in dict.fromkeys(rows) if each[1]]


def _arm_answers(arm: Arm, named: bool) -> list[tuple[str, str, str]]:
    contrast = arm.contrast
    if isinstance(contrast, Refusal):
        return [("Corpus effect against architecture effect", ratio_sentence(arm), "")]
    name = f" ({contrast.other})" if named else ""
    counting = ("At equal compute instead of equal tokens" + name, counting_sentence(arm))
    return [
        (
            f"Architecture effect across corpora{name}",
            interaction_sentence(arm),
            _method(arm.interaction),
        ),
        (
            f"Corpus effect against architecture effect{name}",
            ratio_sentence(arm),
            _method(arm.ratio),
        ),
        (*counting, _method(arm.flops["flops"])),
    ]


def refusals(study: Study, findings: Findings | None) -> list[tuple[str, Refusal]]:
    """Every answer that was refused; equal reasons are listed once."""
    answer = study.answer
    named: list[tuple[str, object]] = [
        *(("Corpus effect", each) for each in answer.corpus),
        *(("Architecture effect", each) for each in answer.architecture),
        *(("Architecture effect, both arms tuned", arm.tuned) for arm in answer.arms),
        *(each for arm in answer.arms for each in _parts(arm)),
        ("Noise between seeds", answer.noise),
        *((f"{law_words(law.law)} of {law.part}", law.fit) for law in study.laws),
        *(("Multiplier", each) for each in study.multipliers),
        *(_of_findings(findings) if findings else ()),
    ]
    by_text: dict[str, tuple[list[str], Refusal]] = {}
    for subject, value in named:
        if isinstance(value, Refusal):
            subjects = by_text.setdefault(str(value), ([], value))[0]
            subjects += [subject] if subject not in subjects else []
    return [("; ".join(subjects), refusal) for subjects, refusal in by_text.values()]


def _of_findings(findings: Findings) -> list[tuple[str, object]]:
    head = findings.headline
    named: list[tuple[str, object]] = [("Ratio in the summary", head.ratio)]
    named += [(f"Worth of the {name} in compute", each) for name, each in head.multipliers.items()]
    named += [(f"Variance shares on {name}", each) for name, each in findings.shares.items()]
    named += [(f"Loss to loss on {name}", each) for name, each in findings.transfers.items()]
    if findings.shown is not None and not len(findings.counting):
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


def _method(result: object) -> str:
    if isinstance(result, Contrast):
        return f"{len(result.pairs)} interpolated pairs; {result.effect.method}."
    method = getattr(result, "method", "")
    return f"{method}." if method else ""
