"""How far beyond its runs a fit may be extrapolated. Ours: the limits are conventions."""

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
    """A point at which a law is evaluated."""

    parameters: float
    tokens: float
    flops: float


def extrapolation(rows: pd.DataFrame, target: Target, *, allow: bool) -> Caveat | Refusal | None:
    """Whether a target is too far beyond the rows: None, a warning, or R-EXTRAP.

    Args:
        rows: the points of the fit.
        target: where the law is evaluated.
        allow: warn instead of refusing beyond ten times the largest compute.
    """
    factor = target.flops / float(np.nanmax(floats(rows, "flops")))
    # A law is no better known far off in D/N than far off in compute.
    ratios = floats(rows, "tokens") / floats(rows, "parameters")
    ratio = target.tokens / target.parameters
    outside = max(float(ratios.min()) / ratio, ratio / float(ratios.max()))
    findings = []
    if factor > FREE_EXTRAPOLATION:
        findings.append(f"{factor:.3g} times the largest compute that was run")
    if outside > RATIO_MARGIN:
        findings.append(f"tokens per parameter {outside:.3g} times outside the range that was run")
    if not findings:
        return None
    if not allow and (factor > LARGEST_EXTRAPOLATION or outside > RATIO_MARGIN):
        return Refusal(
            "R-EXTRAP",
            " and ".join(findings),
            "run larger models, stay within ten times the largest compute, or set allow",
        )
    return Caveat("W-EXTRAP", " and ".join(findings))
