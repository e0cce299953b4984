"""The page of YAML keys that `launch/sweep.py --keys` prints."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from data_pipelines.config import DatasetConfig
from sweeps.architecture import ArchitectureConfig
from sweeps.config import LauncherConfig, SweepConfig
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.keys import Group, Key, list_keys
from trainer.schema import ConfigError, suggest

WIDTH = 96
FILES: Mapping[str, Mapping[str, type]] = {
    "Sweep files (launch/sweep.py)": {"": SweepConfig},
    "Run files (launch/train.py)": {
        "": RunConfig,
        "execution": ExecutionConfig,
        "evaluation": EvaluationConfig,
        "dataset": DatasetConfig,
        "launcher": LauncherConfig,
    },
    "Architecture files (sweeps/architectures/)": {"": ArchitectureConfig},
}
"""The config classes of each kind of file, by the key they lie under."""


def keys_page(prefix: str) -> str:
    """Every key that begins with a prefix, with its type, default and meaning.

    A mapping that has the same keys in several kinds of files is shown for the first of them.

    Raises:
        ConfigError: no key begins with it.
    """
    shown: set[tuple[str, str, type]] = set()
    parts = []
    for title, sections in FILES.items():
        groups = [group for group in file_groups(sections) if _place(group) not in shown]
        shown |= {_place(group) for group in groups}
        lines = [line for group in groups for line in _group_lines(group, prefix)]
        if lines:
            parts += [f"{title}\n{'=' * len(title)}", *lines]
    if not parts:
        raise ConfigError(_unknown(prefix))
    return "\n".join(parts)


def file_groups(sections: Mapping[str, type]) -> Iterator[Group]:
    """The groups of keys of one kind of file."""
    for section, config in sections.items():
        for group in list_keys(config):
            yield _below(section, group) if section else group


def _below(section: str, group: Group) -> Group:
    keys = tuple(replace(key, path=f"{section}.{key.path}") for key in group.keys)
    return replace(group, path=f"{section}.{group.path}".strip("."), keys=keys)


def _place(group: Group) -> tuple[str, str, type]:
    return (group.path, group.kind, group.config)


def _group_lines(group: Group, prefix: str) -> Iterator[str]:
    """A title and the wanted keys; a family listed elsewhere is one line."""
    keys = [key for key in group.keys if _is_below(key.path, prefix)]
    reference = group.same_as and (_is_below(group.path, prefix) or _is_below(prefix, group.path))
    if not keys and not reference:
        return
    where = group.path or "top level"
    yield f"\n{where}, kind {group.kind}" if group.kind else f"\n{where}"
    about = f"Same keys as {group.same_as}." if group.same_as else group.doc
    yield from _indented(about, "  ")
    yield from (line for key in keys for line in _key_lines(key))


def _key_lines(key: Key) -> Iterator[str]:
    default = "required" if key.required else "filled in if left out"
    if key.default is not None:
        default = f"default {key.default}"
    yield from _indented(f"{key.path}: {key.type}; {default}", "    ", hanging="        ")
    yield from _indented(key.doc, "        ")


def _indented(text: str, indent: str, hanging: str = "") -> Sequence[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=hanging or indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _is_below(path: str, prefix: str) -> bool:
    """Whether a key is the prefix or lies below it; `<name>` stands for any one name."""
    words, wanted = path.split("."), prefix.split(".") if prefix else []
    same = (a == b or "<name>" in (a, b) for a, b in zip(words, wanted, strict=False))
    return len(words) >= len(wanted) and all(same)


def _unknown(prefix: str) -> str:
    """The first word of a prefix that no key has, beside the words that keys have there."""
    groups = [group for sections in FILES.values() for group in file_groups(sections)]
    paths = [key.path for group in groups for key in group.keys]
    words = prefix.split(".")
    known: list[str] = []
    for depth in range(len(words)):
        above = ".".join(words[:depth])
        known = [
            p.split(".")[depth] for p in paths if p.count(".") >= depth and _is_below(p, above)
        ]
        if words[depth] not in known and "<name>" not in known:
            break
    return f"no YAML key begins with {prefix!r}; {suggest(words[depth], sorted(set(known)))}"
