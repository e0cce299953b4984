"""The page of YAML keys: whole, and no more than what a file may say."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.keys import FILES, file_groups, keys_page
from sweeps.architecture import ARCHITECTURES
from tests.launch.command import ROOT, forked
from trainer.keys import Group, field_docs
from trainer.schema import ConfigError, kinds_of, load, read_yaml

FIRST, RUN, ARCHITECTURE = FILES
SWEEPS = [(FIRST, p) for p in sorted((ROOT / "sweeps").glob("*.yaml")) if p.stem != "single"]
RUNS = [(RUN, ROOT / "sweeps" / "single.yaml")]
SHAPES = [(ARCHITECTURE, path) for path in sorted(ARCHITECTURES.glob("*.yaml"))]
GROUPS = [group for sections in FILES.values() for group in file_groups(sections)]
CLASSES = [g for g in GROUPS if g.keys and (g.kind or kinds_of(g.config) is None)]
FREE = ("also", "exclude", "blocks", "narrow", "narrow_options")
"""Top-level keys that hold axes, or parts of blocks that the rung completes."""


def accepted(group: Group) -> set[str]:
    """The keys that loading knows: those that its error lists."""
    with pytest.raises(ConfigError, match="unknown key") as raised:
        load(group.config, {"no_such_key": 0, "kind": group.kind} if group.kind else {"no": 0})
    return set(str(raised.value).rpartition("known: ")[2].split(", "))


def leaves(tree: object, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(tree, dict) or not tree:
        yield above
        return
    for key, value in tree.items():
        yield from leaves(value, (*above, key))


@pytest.mark.parametrize("group", CLASSES, ids=lambda g: f"{g.path}:{g.kind}")
def test_the_page_lists_what_loading_accepts_and_nothing_else(group: Group) -> None:
    names = [field.name for field in dataclasses.fields(group.config)]
    listed = {key.path.removeprefix(f"{group.path}.") for key in group.keys}
    assert listed == set(names)
    if names:
        assert listed == accepted(group)


@pytest.mark.parametrize(
    ("title", "path"), SWEEPS + RUNS + SHAPES, ids=lambda each: str(each)[-30:]
)
def test_every_key_of_the_shipped_files_is_on_the_page(title: str, path: Path) -> None:
    groups = list(file_groups(FILES[title]))
    known = {tuple(key.path.split(".")) for group in groups for key in group.keys}
    same = {tuple(g.path.split(".")): tuple(g.same_as.split(".")) for g in groups if g.same_as}

    def found(words: tuple[str, ...]) -> bool:
        fits = any(
            all(a in (b, "<name>") for a, b in zip(key, words, strict=False))
            and len(key) in (len(words), len(words) - 1)
            for key in known
        )
        return fits or any(
            len(words) > len(at)
            and all(a in (b, "<name>") for a, b in zip(at, words, strict=False))
            and found((*to, *words[len(at) :]))
            for at, to in same.items()
        )

    asked = [words for words in leaves(read_yaml(path)) if words[0] not in FREE]
    assert [words for words in asked if not found(words)] == []


@pytest.mark.parametrize("group", [g for g in GROUPS if g.keys], ids=lambda g: f"{g.path}:{g.kind}")
def test_every_key_is_explained(group: Group) -> None:
    assert [key.path for key in group.keys if not key.doc] == []
    if not group.config.__module__.startswith("models."):
        assert list(field_docs(group.config)) == [f.name for f in dataclasses.fields(group.config)]


def test_a_reference_points_to_the_same_class() -> None:
    for sections in FILES.values():
        groups = list(file_groups(sections))
        for group in groups:
            if group.same_as:
                (there,) = [g for g in groups if g.path == group.same_as and not g.kind]
                assert there.config is group.config


def test_a_prefix_leaves_the_rest_out() -> None:
    page = keys_page("optimizer")
    assert "optimizer.weight_decay: float; default 0.1" in page
    assert "schedule" not in page
    assert "kind attention" in keys_page("model.blocks.any.mixer")


def test_a_misspelt_prefix_is_named_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        keys_page("optimiser.beta1")
    with pytest.raises(ConfigError, match="did you mean 'mixer'"):
        keys_page("model.blocks.a.mixr")


def test_the_command_prints_the_page_without_a_sweep_file() -> None:
    ended = forked("launch/sweep.py", "--keys", "launcher")
    assert ended.returncode == 0, ended.stderr
    assert "launcher.cluster: one of local, slurm, inline; default local" in ended.stdout
