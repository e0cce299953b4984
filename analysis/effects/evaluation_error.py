"""The error of an effect that comes from its evaluation set: other documents, another effect.

The documents of a set are a sample of their domain, and all runs of a study are evaluated on the
same ones, so this error is shared by all sizes and does not average out over them. Linearised: a
document's influence on ln(sum a / sum b) is a_d / sum a - b_d / sum b, and the variance of the
effect is the sum of squared influences (Cameron and Miller 2015, section II, with documents as the
clusters).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.intervals import SharedError
from analysis.tables.document_losses import DocumentLosses
from analysis.tables.frames import Array, strings

Documents = Mapping[str, Mapping[str, DocumentLosses]]
"""Run -> evaluation set -> losses of its documents."""


@dataclass(frozen=True)
class Influence:
    """What each document of an evaluation set adds to an effect.

    Attributes:
        logs: influence on the effect on ln L (documents,).
        nats: influence on the effect on the loss (documents,) [nats per token].
    """

    logs: Array
    nats: Array


def shared_error(influence: Array) -> SharedError:
    """The standard error that a sample of documents leaves on an effect."""
    count = len(influence)
    return SharedError(float(np.sqrt(covariance(influence, influence))), count - 1, "documents")


def covariance(left: Array, right: Array) -> float:
    """Covariance of two effects that are measured on the same documents."""
    count = len(left)
    return float(count / (count - 1) * (left @ right))


def influence(pairs: pd.DataFrame, documents: Documents, evaluation_set: str) -> Influence | None:
    """The influence of each document on the mean over sizes of the mean over pairs.

    Args:
        pairs: a row each, with `rung`, `run_id_baseline` and `run_id_other`.
        documents: of the runs.
        evaluation_set: that the pairs are compared on.

    Returns:
        None if some run stored no documents, or the runs read different ones.
    """
    if "run_id_other" not in pairs:
        return None
    _, size, counts = np.unique(strings(pairs, "rung"), return_inverse=True, return_counts=True)
    weights = 1 / counts[size] / len(counts)
    logs: Array = np.zeros(0)
    nats: Array = np.zeros(0)
    targets = None
    sides = (strings(pairs, f"run_id_{side}") for side in ("baseline", "other"))
    for weight, *names in zip(weights, *sides, strict=True):
        before, after = (documents.get(name, {}).get(evaluation_set) for name in names)
        if before is None or after is None:
            return None
        if targets is None:
            targets = before.targets
            logs, nats = np.zeros(len(targets)), np.zeros(len(targets))
        for losses in (before, after):
            if not np.array_equal(losses.targets, targets):
                return None
        read, change = targets.sum(), after.nats - before.nats
        logs = logs + weight * (after.nats / after.nats.sum() - before.nats / before.nats.sum())
        nats = nats + weight * (change - targets * change.sum() / read) / read
    return Influence(logs, nats) if len(logs) > 1 else None
