"""Warnings about a table or a fit: every code, what it means, and what to do about it."""

from dataclasses import dataclass

WARNINGS = {
    "W-OPT": ("the optimiser may have missed the optimum", "fit with ten times the starts"),
    "W-COND": (
        "some combination of parameters is hardly constrained",
        "compare predictions, not parameters",
    ),
    "W-E0": (
        "the floor E is not identified; it may be zero",
        "report no floor, and no multiplier near it",
    ),
    "W-EXTRAP": (
        "the target lies beyond the data",
        "use no interval but one that was tested by holding out larger runs",
    ),
    "W-EDGE": ("the lowest point of a budget is not bracketed", "drop the budget, or add sizes"),
    "W-A2BIAS": (
        "parabolas through such a grid miss the optimum",
        "take the optimum from the fitted law",
    ),
    "W-LR": ("learning rates are not known to be equally good", "call the result untuned"),
    "W-DECAY": (
        "some losses were read before the schedule had ended",
        "exclude them, or model the schedule",
    ),
    "W-COUNT": ("the result may depend on how N or C is counted", "show it under both counts"),
    "W-CLUSTER": ("rows share training, so they are not independent", "resample whole runs"),
    "W-TOK": ("tokenizers differ", "compare bits per byte, not nats per token"),
    "W-EVAL": ("the evaluation set may favour one corpus", "evaluate on more held-out sets"),
    "W-REPEAT": ("training data were repeated", "fit a law of repetition, or exclude the rows"),
    "W-SEED": (
        "no configuration has two seeds, so the noise is unknown",
        "read residual scatter as noise, or run second seeds",
    ),
    "W-SUM": ("the exponents of N and D do not make up C", "look for a slip in the counting"),
    "W-UNIT": ("some values look like a slip of units", "check the columns before using them"),
}


@dataclass(frozen=True)
class Caveat:
    """One warning: its code, and what was found."""

    code: str
    finding: str

    def __post_init__(self) -> None:
        assert self.code in WARNINGS, f"undeclared warning code {self.code}"

    @property
    def meaning(self) -> str:
        """What the code means."""
        return WARNINGS[self.code][0]

    @property
    def action(self) -> str:
        """What to do about it."""
        return WARNINGS[self.code][1]

    def __str__(self) -> str:
        return f"{self.code}: {self.meaning} ({self.finding}); {self.action}"
