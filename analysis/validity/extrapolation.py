"""How far beyond its runs a fit may be asked."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.tables.frames import floats
from analysis.validity.refusal import Refusal
from analysis.validity.warnings import Caveat

LARGEST_EXTRAPOLATION = 10.0


FREE_EXTRAPOLATION = 3.0


RATIO_MARGIN = 3.0


@dataclass(frozen=True)
class Target:
    """A point at which a law is asked."""

    parameters: float
    tokens: float
    flops: float


def extrapolation(rows: pd.DataFrame, target: Target, *, allow: bool) -> Caveat | Refusal | None:
    """How far a target lies beyond the rows: nothing, a warning, or R-EXTRAP.

    Args:
        rows: the points of the fit.
        target: where the law is asked.
        allow: answer beyond ten times the largest compute all the same, with a warning.
    """
    factor = target.flops / float(np.nanmax(floats(rows, "flops")))
    ratios = floats(rows, "tokens") / floats(rows, "parameters")
    ratio = target.tokens / target.parameters
    outside = max(float(ratios.min()) / ratio, ratio / float(ratios.max()))
    findings = []
    if factor > FREE_EXTRAPOLATION:
        findings.append(f"{factor:.3g} times the largest compute that was run")
    if outside > RATIO_MARGIN:
        findings.append(f"tokens per parameter {outside:.3g} times outside what was run")
    if not findings:
        return None
    if not allow and (factor > LARGEST_EXTRAPOLATION or outside > RATIO_MARGIN):
        return Refusal(
            "R-EXTRAP",
            " and ".join(findings),
            "run larger models, ask within ten times the compute, or allow it by name",
        )
    return Caveat("W-EXTRAP", " and ".join(findings))
