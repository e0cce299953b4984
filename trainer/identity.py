"""The ids and hashes that say what a run is, and their comparison wherever a part of one is opened.

A record, a checkpoint and a dataset each state what they were made of. Whoever opens one compares
that with what it expects: a copied checkpoint, an edited config or a replaced tokenizer would
otherwise give numbers of another run under this one's name. This file imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping

from trainer.exit_codes import ExitCode

MEANINGS = {
    "trunk": "trunk id",
    "run": "run id",
    "config_sha256": "config hash",
    "dataset_root_hash": "dataset root hash",
    "tokenizer_fingerprint": "tokenizer fingerprint",
    "certificate": "certificate of samples",
    "parameters_sha256": "hash of the final weights",
}
"""What is compared, by the key under which manifests, records and datasets state it."""

LATER_KEYS: Mapping[str, object] = {
    "optimizer.kind": "adamw",
    "optimizer.ema_decay": None,
    "optimizer.independent_weight_decay": False,
    "optimizer.muon_momentum": 0.95,
    "model.mup": None,
    "schedule.kind": "wsd",
    "schedule.decay_shape": "linear",
    "z_loss": 0.0,
}
"""Keys of a run's config that are younger than the first records, with the value that means what
runs did before there was the key. A hash leaves a key out where it has that value, so that records,
checkpoints and sweeps keep their ids."""


class IdentityError(RuntimeError):
    """Two parts that should be of one run state different ids or hashes."""

    exit_code = ExitCode.BAD_CHECKPOINT


def config_hash(choices: Mapping) -> str:
    """A hash of all choices of a run, as plain data."""
    text = json.dumps(_without_later_keys(choices, ""), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def require_same(
    what: str, stated: Mapping, expected: Mapping[str, object], *, of: str, remedy: str
) -> None:
    """Check that what a part states of itself is what its reader expects.

    Args:
        what: the file or folder that is opened.
        stated: its own facts; those that it lacks are not compared.
        expected: facts of the reader, by the keys of MEANINGS.
        of: who expects them.
        remedy: what the user can do.

    Raises:
        IdentityError: names the first fact that differs.
    """
    for key, wanted in expected.items():
        if key in stated and stated[key] != wanted:
            raise IdentityError(
                f"{what} has the {MEANINGS[key]} {_short(stated[key])}, but {of} has "
                f"{_short(wanted)}; {remedy}"
            )


def _without_later_keys(choices: Mapping, above: str) -> dict[str, object]:
    """The choices without the keys of LATER_KEYS that have the value from before them."""
    return {
        key: _without_later_keys(value, f"{above}{key}.") if isinstance(value, Mapping) else value
        for key, value in choices.items()
        if f"{above}{key}" not in LATER_KEYS or value != LATER_KEYS[f"{above}{key}"]
    }


def _short(fact: object) -> str:
    return "of no single run" if fact is None else str(fact)[:18]
