"""Every key of the schema with every odd value: accepted and used, or one line; never a traceback.

It walks the list of keys that `launch/sweep.py --keys` prints, so that a new key is covered.
"""

import copy
import dataclasses
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.keys import FILES, file_groups
from launch.sweep import check_sweep
from launch.train import read_run_file
from models.channel import channel_kinds
from models.mixer import Pattern, mixer_class, mixer_kinds
from sweeps.architecture import ArchitectureConfig
from sweeps.grammar import Sweep, read_sweep_file
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from tests.models.conftest import SMALL
from tests.trainer.conftest import PLAIN
from trainer.keys import Group, Key
from trainer.schema import ConfigError, dump, load, read_yaml
from untrusted.paths import PathError
from untrusted.yaml_text import dump_yaml

SWEEP, RUN, ARCHITECTURE = FILES
ABSENT = object()
VALUES: dict[str, object] = {
    "absent": ABSENT,
    "null": None,
    "empty": "",
    "zero": 0,
    "zero point": 0.0,
    "one": 1,
    "two": 2,
    "a half": 0.5,
    "negative": -1,
    "slightly negative": -1e-9,
    "huge": 2**62,
    "beyond all": 10**60,
    "huge float": 1e300,
    "tiny float": 1e-300,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "text": "some text",
    "a path": "../../elsewhere",
    "unicode": "\u4e2d\u6587",
    "right to left": "a\u202eb",
    "control": "a\x07b\n",
    "long": "x" * 5_000,
    "interpolation": "${oc.env:HOME}",
    "empty list": [],
    "list": [1],
    "list of text": ["a", "a"],
    "list of lists": [[1], {}],
    "empty mapping": {},
    "mapping": {"no_such_key": 1},
    "mapping of null": {"a": None},
}
DATASET = {"name": "tiny", "source": {"kind": "installed"}, "block_tokens": 128}


def groups(title: str) -> list[Group]:
    """Groups with keys; those of mixers and channels once, in files of runs."""
    found = [group for group in file_groups(FILES[title]) if group.keys]
    if title == RUN:
        return found
    return [group for group in found if not group.path.startswith("model.blocks")]


def run_tree(group: Group) -> dict[str, Any]:
    """A run's file with the mixer or channel that a group is about."""
    tree: dict[str, Any] = copy.deepcopy(PLAIN)
    tree |= {"dataset": copy.deepcopy(DATASET), "execution": {"data_root": "nowhere"}}
    tree["evaluation"] = {"milestones": [1024]}
    tree["launcher"] = {}
    tree["model"]["n_layers"] = 1
    if group.path.startswith("model.encoder"):
        tree["objective"] = "seq2seq"
        block = tree["model"]["blocks"]["a"]
        tree["model"]["blocks"]["c"] = {**block, "cross": dict(block["mixer"])}
        tree["model"] |= {"pattern": "c", "encoder": {"pattern": "a"}, "vocab_size": 258}
    if group.path.endswith(".mixer") and group.kind:
        tree["model"]["blocks"]["a"]["mixer"] = {"kind": group.kind, **small(group.kind)}
        if Pattern.CAUSAL_SELF not in mixer_class(group.kind).patterns:
            tree["objective"] = "masked_lm"
            tree["model"] |= {"form": "encoder", "vocab_size": 258}
    if group.path.endswith(".channel") and group.kind:
        wanted = {f.name for f in dataclasses.fields(channel_kinds()[group.kind])}
        sizes = {"d_hidden": 32} if "d_hidden" in wanted else {}
        tree["model"]["blocks"]["a"]["channel"] = {"kind": group.kind, **sizes}
    return tree


def small(kind: str) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(mixer_kinds()[kind])}
    sizes = {name: value for name, value in SMALL.items() if name in names}
    if "mixers" in sizes:
        sizes["mixers"] = {name: dump(each) for name, each in SMALL["mixers"].items()}  # type: ignore[attr-defined]
    return sizes


def sweep_tree(group: Group) -> dict[str, Any]:
    """The smoke sweep with one architecture and size."""
    tree = read_yaml(Path("sweeps/smoke.yaml"))
    tree |= {"architectures": ["transformer"], "also": [], "execution": {"data_root": "nowhere"}}
    tree["ladders"]["default"]["rungs"] = ["10k"]
    if group.path.startswith("ladders.<name>.replicates"):
        tree["ladders"]["default"]["replicates"] = {"rungs": ["10k"], "seeds": [18]}
    if group.path.startswith("recipes"):
        tree["recipes"] = {"mine": {}}
    return tree


def place(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds a key, made where there is none, and the key's last word."""
    *above, last = path.split(".")
    for word in above:
        name = next(iter(tree)) if word == "<name>" else word
        tree = tree.setdefault(name, {})
    return tree, last


def changed(tree: dict[str, Any], key: Key, value: object) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    below, last = place(tree, key.path)
    if value is ABSENT:
        below.pop(last, None)
    else:
        below[last] = value
    return tree


def stored(tree: dict[str, Any], path: str) -> object:
    """What a loaded config holds at a path."""
    below, last = place(copy.deepcopy(tree), path)
    return below.get(last)


def cases(group: Group) -> Iterator[tuple[Key, str, object]]:
    """All values for each key, and a few that a seed draws."""
    draw = random.Random(zlib.crc32(f"{group.path}:{group.kind}".encode()))
    for key in group.keys:
        for name, value in VALUES.items():
            yield key, name, value
        for i in range(4):
            bits = draw.choice((4, 12, 30, 60))
            number = draw.randint(-(2**bits), 2**bits)
            yield key, f"drawn {i}", draw.choice((number, number / 2**bits, str(number), [number]))


def refusal(read: Any, tree: dict[str, Any], file: Path) -> tuple[str, Any]:
    """The message that a file is refused with, or an empty one and what it was read as."""
    file.write_text(dump_yaml(tree))
    try:
        return "", read(file)
    except (ConfigError, PathError) as error:
        return str(error), None


def refuses(message: str, name: str) -> bool:
    # A sweep lists its problems, one a line.
    assert "\n" not in message.replace("\n  ", ""), message
    assert len(message) < 3_000
    assert os.environ["HOME"] not in message or name != "interpolation"
    return bool(message)


def same(asked: object, held: object) -> bool:
    """Whether a config holds what was asked for; a mapping's defaults are filled in."""
    if isinstance(asked, dict) and isinstance(held, dict):
        return all(same(value, held.get(key)) for key, value in asked.items())
    if isinstance(asked, list | tuple) and isinstance(held, list | tuple):
        return len(asked) == len(held) and all(map(same, asked, held))
    if isinstance(held, float) and isinstance(asked, int | float):
        return float(asked) == held and not isinstance(asked, bool)
    return asked == held and isinstance(asked, bool) == isinstance(held, bool)


@pytest.mark.parametrize("group", groups(RUN), ids=lambda g: f"{g.path}:{g.kind}")
def test_every_key_of_a_run_is_used_or_refused(group: Group, tmp_path: Path) -> None:
    tree = run_tree(group)
    for key, name, value in cases(group):
        asked = changed(tree, key, value)
        message, read = refusal(lambda file: read_run_file(file, []), asked, tmp_path / "run.yaml")
        if refuses(message, name) or value is ABSENT:
            continue
        experiment, launcher, dataset = read
        held = dump(experiment.run) | {
            "execution": dump(experiment.execution),
            "evaluation": dump(experiment.evaluation),
            "launcher": dump(launcher),
            "dataset": dump(dataset),
        }
        assert same(value, stored(held, key.path)), f"{key.path}: {name} was not used"


@pytest.mark.parametrize("group", groups(SWEEP), ids=lambda g: f"{g.path}:{g.kind}")
def test_every_key_of_a_sweep_is_used_or_refused(group: Group, tmp_path: Path) -> None:
    tree = sweep_tree(group)

    def read_sweep(file: Path) -> Sweep:
        sweep = read_sweep_file(file, [])
        check_sweep(sweep)
        return sweep

    (tmp_path / "base.yaml").write_text(dump_yaml(tree))
    base = read_sweep(tmp_path / "base.yaml")
    for key, name, value in cases(group):
        asked = changed(tree, key, value)
        message, read = refusal(read_sweep, asked, tmp_path / "sweep.yaml")
        if refuses(message, name) or value is ABSENT:
            continue
        assert same(value, stored(dump(read.config), key.path)), f"{key.path}: {name}"
        if read.config != base.config and not key.path.startswith(ELSEWHERE):
            default = stored(dump(base.config), key.path)
            used = read.experiments != base.experiments or same(value, default)
            assert used or value in (None, {}, []), f"{key.path}: {name} was not used"


ELSEWHERE = (
    "name", "launcher", "baselines", "corpora.<name>.neutral_set", "corpora.<name>.dataset",
    "ladders", "also", "exclude", "model", "optimizer", "schedule", "execution", "evaluation",
)  # fmt: skip
"""Keys of the launcher, the report and the data; and whole sections, whose keys are tried."""


@pytest.mark.parametrize("group", groups(ARCHITECTURE), ids=lambda g: f"{g.path}:{g.kind}")
def test_every_key_of_an_architecture_is_used_or_refused(group: Group, tmp_path: Path) -> None:
    block = {"mixer": {"kind": "attention"}, "channel": {"kind": "swiglu"}}
    tree = {"blocks": {"a": block}, "pattern": "a", "model": {}}
    there = Shape(RUNGS["10k"], 257, 64)

    def read_architecture(file: Path) -> ArchitectureConfig:
        config = load(ArchitectureConfig, read_yaml(file), "architecture")
        size_architecture("architecture", config, there, tolerance=10.0)
        return config

    for key, name, value in cases(group):
        asked = changed(tree, key, value)
        message, read = refusal(read_architecture, asked, tmp_path / "architecture.yaml")
        if not refuses(message, name) and value is not ABSENT:
            assert same(value, stored(dump(read), key.path)), f"{key.path}: {name} was not used"


def test_every_class_of_the_page_of_keys_is_tried() -> None:
    tried = {g.config for title in FILES for g in groups(title)}
    listed = [g for title in FILES for g in file_groups(FILES[title]) if g.keys]
    assert {g.config for g in listed} <= tried


def test_the_unchanged_files_are_accepted(tmp_path: Path) -> None:
    for group in groups(RUN):
        tree = run_tree(group)
        message, _ = refusal(lambda file: read_run_file(file, []), tree, tmp_path / "run.yaml")
        assert not message or "for evaluation only" in message, f"{group.kind}: {message}"
