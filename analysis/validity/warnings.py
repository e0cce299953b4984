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
        "the target is beyond the data",
        "rely only on intervals that were back-tested on held-out larger runs",
    ),
    "W-EDGE": ("the lowest point of a budget is not bracketed", "drop the budget, or add sizes"),
    "W-A2BIAS": (
        "a parabola through this grid is biased",
        "take the optimum from the fitted law",
    ),
    "W-LR": ("learning rates may not be equally well tuned", "report the result as untuned"),
    "W-TUNING": (
        "what the rates and batches in use cost each arm is not known from this study",
        "ask for tuning_probes in the sweep's ladder; half and twice the rate and the batch of "
        "each arm are then trained too",
    ),
    "W-DECAY": (
        "some losses were read before the schedule had ended",
        "exclude them, or fit a law that models the schedule",
    ),
    "W-COUNT": ("the result may depend on how N or C is counted", "report it under both counts"),
    "W-CLUSTER": ("rows of one run are not independent", "cluster by run or trunk"),
    "W-TOK": ("tokenizers differ", "compare bits per byte, not nats per token"),
    "W-LOSSY": (
        "bits per byte are those of text that the tokenizer changed",
        "compare them with no other tokenizer's",
    ),
    "W-EVAL": ("the evaluation set may favour one corpus", "evaluate on more held-out sets"),
    "W-REPEAT": ("training data were repeated", "fit the repeat law, or exclude the rows"),
    "W-SEED": (
        "the noise between seeds is unknown, or only a part of it is known",
        "run second seeds of both the weights and the order of samples",
    ),
    "W-SUM": ("the exponents of N* and D* do not add up to that of C", "check how C is counted"),
    "W-UNIT": ("some values look like a unit error", "check the units of these columns"),
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
