"""Refusals: the codes, and the form an answer takes that the data cannot support."""

from dataclasses import dataclass

CODES = {
    "R-UNDER": "too few points, or too narrow a design, for this law",
    "R-FACTOR": "the study holds a single level of this factor",
    "R-PAIRS": "too few matched pairs for an interval",
    "R-AMBIGUOUS": "several runs share architecture, corpus, size, tokens and seed",
    "R-EVAL": "the evaluation set differs between runs",
    "R-RATIO": "the denominator of the ratio may be zero",
    "R-SEED": "no cell was run with two seeds",
    "R-REACH": "the two arms have no loss in common inside the data",
    "R-MULT": "the multiplier is undefined in too many bootstrap replicates",
    "R-TUNING": "a difference between the runs may be one of their learning rate or batch",
    "R-EXTRAP": "the target is too far beyond the data",
    "R-CELLS": "too few cells hold every combination of the levels",
    "R-INTERACTION": "the architecture effect depends on the corpus",
    "R-EMPTY": "there is nothing to analyse yet",
}


@dataclass(frozen=True)
class Refusal:
    """An answer that the data do not support: its code, the reason, and what would support it."""

    code: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        assert self.code in CODES, f"undeclared refusal code {self.code}"

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}; {self.remedy}"
