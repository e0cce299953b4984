"""Write a sweep's report: page, figures, tables and numbers, only where something changed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.effects.contrasts import Contrast
from analysis.figures.all_figures import draw
from analysis.fitting.estimator import Fit
from analysis.report.answers import answers, laws_table, progress, refusals
from analysis.report.page import render
from analysis.report.sections import Section, sections
from analysis.report.strict_json import plain
from analysis.study.findings import Findings, find
from analysis.study.study import Settings, Study, analyse
from analysis.tables.run_table import Table, results
from analysis.tables.sweep_folder import load
from analysis.words.sentences import exponent_words
from trainer.record import read_json, write_atomically, write_json

MOST_LINES = 30


FULL = Settings()


QUICK = Settings(replicates=100)


@dataclass(frozen=True)
class Report:
    """A written report: where it lies, its numbers, and what a terminal shows of it."""

    page: Path
    numbers: dict
    lines: tuple[str, ...]

    def text(self) -> str:
        """The answers and the fitted laws for a terminal, at most 30 lines."""
        return "\n".join(self.lines)


def write_report(sweep: Path, *, plan: Mapping | None = None) -> Report:
    """Analyse a sweep folder and write its `report/`; a partial sweep gives a partial page.

    `plan` is what was expected before the sweep; the page shows it as it is.
    """
    return _write(load(sweep), sweep, dict(plan or {}), FULL)


def refresh(sweep: Path) -> Report:
    """The report as `write_report` would write it, written only if it is not there as such."""
    table = load(sweep)
    stored = _written(sweep / "report")
    whole = stored.get("settings") == plain(FULL)
    if whole and stored.get("fingerprint") == fingerprint(table):
        return Report(sweep / "report" / "index.html", stored, tuple(stored["text"]))
    return write_report(sweep)


def redraw(sweep: Path, *, plan: Mapping | None = None) -> Report:
    """Write the report if points or states changed since, with a quarter of the replicates."""
    table = load(sweep)
    folder = sweep / "report"
    stored = _written(folder)
    if stored.get("fingerprint") == fingerprint(table):
        return Report(folder / "index.html", stored, tuple(stored["text"]))
    return _write(table, sweep, dict(plan or {}), QUICK)


def _written(folder: Path) -> dict:
    """The numbers of the report that is there; empty if it is missing or damaged."""
    try:
        stored = read_json(folder / "report.json")
    except (RuntimeError, OSError):
        return {}
    text = stored.get("text")
    whole = isinstance(text, list) and all(isinstance(line, str) for line in text)
    return stored if whole and (folder / "index.html").exists() else {}


def fingerprint(table: Table) -> str:
    """A hash of everything that a table holds, and of the code that makes a page of it."""
    parts = [table.rows.to_json(), table.runs.to_json(), repr(table.exclusions), table.neutral_set]
    parts += [table.baselines.to_json(), table.ladder.to_json(), table.training.to_json()]
    parts += [table.probes.to_json(), table.use.to_json()]
    parts += [repr(table.tuning), repr(table.rate_factors)]
    here = Path(__file__).parents[1]
    parts += [file.read_text() for file in sorted([*here.rglob("*.py"), *here.rglob("*.html")])]
    return hashlib.sha256("".join(str(part) for part in parts).encode()).hexdigest()[:16]


def _write(table: Table, sweep: Path, plan: dict, settings: Settings) -> Report:
    folder = sweep / "report"
    study = analyse(table, settings)
    findings = None if study.rate_search else find(study, settings)
    parts, plates = sections(study), draw(study, findings)
    every = [*plates, *(plate for part in parts for plate in part.plates)]
    drawings = {plate.name: (plate.save(folder / "figures"), plate.narrow()) for plate in every}
    _remove_stale_figures(folder / "figures", set(drawings))
    _write_tables(study, parts, folder / "tables")
    lines = _terminal_lines(study, parts, folder, findings)
    numbers = plain(
        {
            "fingerprint": fingerprint(table),
            "sweep": table.name,
            "progress": progress(table),
            "settings": settings,
            "answer": study.answer,
            "effects": study.effects,
            "laws": study.laws,
            "family": study.family,
            "multipliers": study.multipliers,
            "headline": findings.headline if findings else None,
            "reservations": findings.reservations if findings else (),
            "variance_shares": findings.shares if findings else {},
            **{part.name: part.numbers for part in parts},
            "refusals": [
                {"of": subject, "refusal": each} for subject, each in refusals(study, findings)
            ],
            "exclusions": table.exclusions,
            "plan": plan,
            "text": lines,
        }
    )
    assert isinstance(numbers, dict)
    write_atomically(folder / "index.html", render(study, parts, plates, drawings, plan, findings))
    # Last: it holds the fingerprint that says the report is whole.
    write_json(folder / "report.json", numbers)
    return Report(folder / "index.html", numbers, lines)


def _remove_stale_figures(folder: Path, drawn: set[str]) -> None:
    """A figure of an earlier report that this one would not draw must not lie beside it."""
    for file in folder.glob("*.*"):
        if file.suffix in (".png", ".svg", ".csv") and file.stem not in drawn:
            file.unlink()


def _write_tables(study: Study, parts: list[Section], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "laws": laws_table(study),
        "effects": _effects_table(study),
        "family": study.family,
        "alternatives": study.alternatives,
        "runs": study.table.runs,
        "points": study.points.rows,
        "results": results(study.points),
        **{part.name: part.numbers for part in parts},
    }
    for name, frame in tables.items():
        frame.to_csv(folder / f"{name}.csv", index=False)


def _effects_table(study: Study) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "evaluation_set": set_name,
            "factor": factor,
            "other": each.other,
            "baseline": each.baseline,
            "ln_loss": each.effect.estimate,
            "low": each.effect.low,
            "high": each.effect.high,
            "nats": each.nats.estimate,
            "pairs": len(each.pairs),
            "interval": each.effect.method,
            "matching": each.matching,
        }
        for set_name, factors in study.effects.items()
        for factor, contrasts in factors.items()
        for each in contrasts
        if isinstance(each, Contrast)
    )


def _terminal_lines(
    study: Study, parts: list[Section], folder: Path, findings: Findings | None
) -> tuple[str, ...]:
    lines = [f"{study.table.name}: {progress(study.table)}", ""]
    lines += [line for part in parts for line in part.lines]
    lines += [f"{lead}: {text}" for lead, text, _ in answers(study, findings)]
    codes = ", ".join(each.code for each in findings.reservations) if findings else ""
    lines += [f"Warnings, explained on the page: {codes}"] if codes else []
    lines += _law_lines(study)
    refused = refusals(study, findings)
    if refused:
        lines += [
            "",
            f"Answers refused: {len(refused)}, each with its remedy on the page; the first:",
        ]
        lines.append(f"  {refused[0][0]}: {refused[0][1].reason}")
    kept = lines[: MOST_LINES - 3]
    if len(lines) > len(kept):
        kept.append(f"  and {len(lines) - len(kept)} lines more on the page")
    return (*kept, "", f"Report: {folder / 'index.html'}")


def _law_lines(study: Study) -> list[str]:
    lines = []
    for law in study.laws:
        if isinstance(law.fit, Fit) and law.evaluation_set == study.table.neutral_set:
            hidden = {"E"} if "W-E0" in law.fit.codes else set()
            exponents = [
                f"{name} {exponent_words(law.intervals[name])}"
                for name in ("alpha", "beta", "gamma", "E")
                if name in law.intervals and name not in hidden
            ]
            lines.append(f"  {law.part}: {', '.join(exponents) or 'no shared parameter'}")
    title = f"Fitted laws on {study.table.neutral_set}, 95 % intervals:"
    return ["", title, *lines] if lines else []
