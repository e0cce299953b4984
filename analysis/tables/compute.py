"""Training compute of runs: the FLOPs that a table counts, or C = 6 N D where it counts none.

6 N D: two FLOPs a parameter and token forward, four backward (Kaplan et al. 2001.08361, section
2.1). It leaves out attention and scans, so counted FLOPs go first.
"""

import pandas as pd

from analysis.tables.frames import Array, floats

FLOPS_PER_PARAMETER_TOKEN = 6.0


def six_nd(parameters: Array, tokens: Array) -> Array:
    """C = 6 N D."""
    # The factor is a float: int64 counts would overflow at 9.2e18 FLOPs without a word.
    return FLOPS_PER_PARAMETER_TOKEN * parameters * tokens


def training_flops(rows: pd.DataFrame) -> Array:
    """Training FLOPs of each row; 6 N D where the table does not count them."""
    if "flops" in rows:
        return floats(rows, "flops")
    return six_nd(floats(rows, "parameters"), floats(rows, "tokens"))
