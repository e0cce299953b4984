"""How well a sweep used its machine, in words."""

import numpy as np

from analysis.tables.frames import floats, keep, strings
from analysis.tables.run_table import Table


def use_sentence(table: Table) -> str:
    """The median share of the GEMM peak over runs, in all and by arm, and what evaluation took."""
    runs = keep(table.use, np.isin(strings(table.use, "run_id"), strings(table.runs, "run_id")))
    shares = floats(runs, "gemm_peak_share")
    if not np.isfinite(shares).any():
        return ""
    arms = strings(runs, "architecture")
    by_arm = ", ".join(
        f"{arm} {np.nanmedian(shares[arms == arm]):.2f}"
        for arm in table.levels("architecture")
        if np.isfinite(shares[arms == arm]).any()
    )
    training, evaluation = (
        float(np.nansum(floats(table.use, name)))
        for name in ("training_seconds", "evaluation_seconds")
    )
    took = 100 * evaluation / max(training + evaluation, 1e-9)
    return (
        f"Half of the runs reach {np.nanmedian(shares):.2f} of the GEMM peak or more ({by_arm}); "
        f"evaluation took {took:.0f} % of the time."
    )
