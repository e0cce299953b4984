"""The folder of a sweep: which study it holds, and who is training it.

A study is an expanded sweep, and has an id. A folder holds one study at a time: where another
expansion of the same name takes its place, the report and sweep.yaml of the first are kept in
`earlier/<id>/`, and runs that both have are shared. Two commands may train the same study at once,
but not two studies.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.plan import Plan, ladder_table
from sweeps.architecture import read_architectures
from sweeps.grammar import Sweep
from sweeps.recipes import arms
from trainer.record import write_atomically
from trainer.schema import ConfigError, dump, read_yaml
from untrusted.paths import inside
from untrusted.yaml_text import dump_yaml

KEPT = ("sweep.yaml", "ladder.parquet", "baselines.json", "report")
"""What belongs to a study, beside its runs."""
SHOWN = 6


def describe(plan: Plan) -> dict[str, Any]:
    """What sweep.yaml says of a study."""
    sweep = plan.sweep
    stored = {
        "name": sweep.folder_name,
        "runs": [e.folder_name for e in sweep.experiments if not e.label and not e.probe],
        "repeats": [e.folder_name for e in sweep.experiments if e.label],
        "probes": {e.folder_name: asdict(e.probe) for e in sweep.experiments if e.probe},
        "trunks": [unit.name for unit in plan.units if unit.trunk is not None],
        "neutral_set": sweep.corpora.neutral_set,
        "tuning": _tuning(sweep),
        "recipes": {arm: own for arm, own, _ in arms(sweep.config) if arm != own},
        "config": dump(sweep.config),
    }
    return {"id": study_id(stored), **stored}


def study_id(stored: Mapping[str, Any]) -> str:
    """A hash of what a study trains and measures; how it is executed is no part of it."""
    config = stored["config"]
    parts = {key: sorted(stored.get(key, [])) for key in ("runs", "repeats", "trunks")}
    choices = {
        **parts,
        **{key: stored.get(key) for key in ("neutral_set", "tuning")},
        **({"probes": stored["probes"]} if stored.get("probes") else {}),
        "baselines": config.get("baselines"),
        "evaluation": _measured(config),
        "of the ladder": _measured(config["ladders"][config["ladder"]]),
    }
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]


def _measured(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section asks to be measured; in which batches changes nothing."""
    asked = dict(section.get("evaluation") or {})
    asked.pop("batch_sequences", None)
    return asked


def earlier_study(folder: Path, stored: Mapping[str, Any]) -> str:
    """What changes where the folder holds another study; empty where it does not."""
    before = _stored(folder)
    if before is None or study_id(before) == stored["id"]:
        return ""
    old, new = ({*each["runs"], *each.get("repeats", [])} for each in (before, stored))
    changed = list(_changed(before["config"], stored["config"], ""))
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"{folder} holds study {study_id(before)} of {len(old)} runs; study {stored['id']} has "
        f"{len(old & new)} of them, adds {len(new - old)} and leaves out {len(old - new)} "
        f"(changed: {', '.join(changed[:SHOWN]) or 'architectures'}{more})"
    )


@contextlib.contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Hold a folder for a study; other commands may hold it for the same one.

    Raises:
        ConfigError: another command trains another study there.
    """
    locks = folder / "launchers"
    locks.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with (locks / "guard").open("a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            for other in sorted(locks.glob("*.lock")):
                if other.stem != name and _is_held(other):
                    raise ConfigError(
                        f"{folder} is in use: another command trains study {other.stem} of the "
                        f"same name, and this one is study {name}; wait for it, or give this one "
                        f"a name of its own, such as name={folder.name}-2"
                    )
            mine = held.enter_context(inside(locks, f"{name}.lock").open("a"))
            fcntl.flock(mine, fcntl.LOCK_SH)
        yield


def write_study(folder: Path, plan: Plan, stored: Mapping[str, Any]) -> None:
    """Store a study in its folder; what an earlier one left there is kept aside."""
    before = _stored(folder)
    if before is not None and study_id(before) != stored["id"]:
        _keep(folder, study_id(before))
    write_atomically(folder / "sweep.yaml", dump_yaml(stored))
    ladder_table(plan.runs).to_parquet(folder / "ladder.parquet")


def _keep(folder: Path, name: str) -> None:
    """Move a study's own files to `earlier/<id>/`; sweep.yaml last, so that a kill repeats it."""
    aside = inside(folder, "earlier", name)
    aside.mkdir(parents=True, exist_ok=True)
    for each in reversed(KEPT):
        here, there = inside(folder, each), inside(aside, each)
        if here.exists():
            if there.is_dir():
                shutil.rmtree(there)
            here.rename(there)


def _stored(folder: Path) -> dict[str, Any] | None:
    """The study that a folder holds, or None."""
    file = folder / "sweep.yaml"
    if not file.exists():
        return None
    stored = read_yaml(file)
    try:
        study_id(stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} describes no study; move it away") from error
    return stored


def _is_held(lock: Path) -> bool:
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _changed(old: object, new: object, path: str) -> Iterator[str]:
    """Dotted paths at which two trees of plain data differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _changed(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    elif old != new:
        yield path


def _tuning(sweep: Sweep) -> dict[str, dict[str, object]]:
    """Where each arm's learning rate comes from: its rule, or its factor.

    A search of the sweep's own recipe is no evidence for another one.
    """
    known = read_architectures()
    by_rule = sweep.config.ladders[sweep.config.ladder].learning_rate is None
    found: dict[str, dict[str, object]] = {}
    for name, architecture, recipe in arms(sweep.config):
        rule, own = known[architecture].tuning, name == architecture
        scale = 1.0 if by_rule else known[architecture].learning_rate_scale
        found[name] = {
            "learning_rate_scale": scale * recipe.learning_rate_factor,
            "evidence": known[architecture].learning_rate_evidence if own else "",
        }
        if own and by_rule and rule is not None:
            found[name] = {"learning_rate_scale": 1.0, "evidence": rule.search, "rule": dump(rule)}
    return found
