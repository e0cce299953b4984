"""The hashes that name a run, its trunk and its evaluations."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trainer.config import EvaluationConfig, RunConfig
from trainer.schema import dump


def run_id(config: RunConfig) -> str:
    """The name of a run's folder: a hash of all its choices."""
    return _digest(dump(config))


def trunk_id(config: RunConfig) -> str:
    """The id that the horizons of one trunk share: a hash of all choices but budget and decay."""
    choices = dump(config)
    del choices["budget"]
    del choices["schedule"]["decay_fraction"], choices["schedule"]["final_share"]
    return "trunk-" + _digest(choices)


def evaluation_id(config: EvaluationConfig) -> str:
    """The id of comparable evaluations: a hash of what is read, not of when or in which batches."""
    choices = dump(config)
    del choices["milestones"], choices["batch_sequences"]
    return _digest(choices)


def _digest(choices: Mapping[str, Any]) -> str:
    text = json.dumps(choices, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
