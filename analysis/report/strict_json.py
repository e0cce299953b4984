"""The numbers of a study as strict JSON: what is kept, what is left out, no NaN."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Fit
from analysis.inference.bootstrap import Bootstrap
from analysis.laws.law import Law
from analysis.validity.refusal import Refusal

_OF_A_FIT = (
    "parameters", "pivots", "objective", "delta", "sigma", "starts", "starts_agreeing",
    "condition", "status", "warnings",
)  # fmt: skip


def plain(value: object) -> object:
    """A value as strict JSON: no NaN, frames as records, arrays and pairs left out."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, (float, np.floating, np.integer)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (pd.Series, Mapping)):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, pd.DataFrame):
        return [plain(record) for record in value.to_dict("records")]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        return plain(_fields(value))
    return str(value)


def _fields(value: object) -> dict[str, object]:
    if isinstance(value, Refusal):
        return {"refused": value.code, "reason": value.reason, "remedy": value.remedy}
    if isinstance(value, Fit):
        return {"points": len(value.rows), **{name: getattr(value, name) for name in _OF_A_FIT}}
    if isinstance(value, Bootstrap):
        return {"method": value.method, "clusters": value.clusters}
    if isinstance(value, Law):
        return {"name": value.name, "by": value.by, "varies": sorted(value.varies)}
    names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
    return {name: getattr(value, name) for name in names if name != "pairs"}
