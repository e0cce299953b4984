"""Plain data to config classes and back, with errors that name the key, the problem and the fix."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from models.channel import ChannelConfig, channel_kinds
from models.mixer import MixerConfig, mixer_kinds
from untrusted.yaml_text import MAX_BYTES, parse_yaml

LARGEST_INT = 2**63 - 1

Config = TypeVar("Config")

_WANTED = {
    bool: "true or false",
    int: "a whole number, such as 10",
    float: "a number, such as 0.5",
    str: 'text, in quotes if it looks like a number or true, false or null, such as "1e6"',
    dict: "a mapping of keys to values",
}

RENAMED: Mapping[str, str] = {}
"""Old key path -> new key path, or "" for a key that is gone: the only shim for stored configs."""


SAME_KEYS = frozenset(["optimizer", "schedule"])
"""Sections whose kinds share most keys, so that those stay when the kind changes."""


_PART = re.compile(r"[^\s.\[\]{}=](?:[^.\[\]{}=\n]*[^\s.\[\]{}=])?")
"""A word between the dots of an override's key."""


_LONG_WORD = re.compile(r"\S{300,}")


class ConfigError(ValueError):
    """A config or argument is invalid; the message names the key, the problem and the fix.

    A word that would fill the screen is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_LONG_WORD.sub(lambda found: f"{found[0][:80]}...", message))


def dump(config: object) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, with the `kind` of each part."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def load(kind: type[Config], data: object, path: str = "") -> Config:
    """Build a config, or check a value, from plain data.

    Args:
        kind: the dataclass to build, or a plain type.
        data: plain data, as from YAML.
        path: of the data within the file, for messages.

    Raises:
        ConfigError: a key is unknown, missing, of a wrong type or out of range.
    """
    return _load(kind, data, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file into plain data.

    Raises:
        ConfigError: it is missing, too large, not YAML, has duplicate keys or is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the path of a YAML file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes, too large for a config")
    try:
        plain = parse_yaml(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a mapping at its top level; write key: value lines")
    return plain


def read_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read `a.b=value` arguments into nested data.

    Raises:
        ConfigError: an argument is not of this form, or two give the same key.
    """
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(map(_PART.fullmatch, key.split("."))):
            raise ConfigError(
                f"{word[:200]!r} is not an override; write key=value, such as ladder=evening or "
                "optimizer.weight_decay=0.1"
            )
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{word[:200]!r} cannot be read: {error}") from error
        _place(tree, key, value)
    return tree


def _place(tree: dict[str, Any], key: str, value: object) -> None:
    """Put a value at a dotted key; what an earlier override gave is never replaced."""
    *above, last = key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            break
    if not isinstance(tree, dict) or last in tree:
        raise ConfigError(f"{key} is overridden twice, as a whole or in part; give it once")
    tree[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge one tree of plain data over another; mappings merge, everything else is replaced.

    A mapping whose `kind` changes is replaced whole, since its other keys belong to the old kind;
    but in SAME_KEYS.
    """
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = value
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            continue
        if key in SAME_KEYS or value.get("kind", below.get("kind")) == below.get("kind"):
            merged[key] = merge(below, value)
    return merged


def suggest(wrong: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the closest known name, then all known names."""
    close = difflib.get_close_matches(wrong, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def kinds_of(config: type) -> Mapping[str, type] | None:
    """The classes that a `kind` key chooses from, by that name; None for a class of one kind."""
    families = {MixerConfig: mixer_kinds, ChannelConfig: channel_kinds}
    return families[config]() if config in families else None


def _load(kind: Any, data: object, path: str) -> Any:  # noqa: ANN401
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        _check_section(arguments[1], data, path)
        return data
    if origin in (types.UnionType, typing.Union):
        (inner,) = [a for a in arguments if a is not type(None)]
        return None if data is None else _load(inner, data, path)
    if origin is Literal:
        # True equals 1, and 1.0 does.
        if not any(type(data) is type(each) and data == each for each in arguments):
            raise ConfigError(f"{path} is {data!r}; choose from {', '.join(map(str, arguments))}")
        return data
    if origin is dict:
        pairs = _mapping(data, path).items()
        return {str(key): _load(arguments[1], value, f"{path}.{key}") for key, value in pairs}
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{path} is {data!r}; write a list")
        return tuple(_load(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if dataclasses.is_dataclass(kind):
        return _load_fields(_resolve_kind(kind, data, path), data, path)
    return _load_scalar(kind, data, path)


def _check_section(kind: Any, data: object, path: str) -> None:  # noqa: ANN401
    """Check keys that go over those of a class: each is one of its own, and of its type.

    Parts of blocks are checked when they are complete.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    for key, value in _mapping(data, path).items():
        if key not in hints:
            raise ConfigError(f"unknown key {path}.{key}; {suggest(str(key), list(hints))}")
        if typing.get_origin(hints[key]) is dict:
            check_blocks(value, f"{path}.{key}")
        else:
            _load(hints[key], value, f"{path}.{key}")


def check_blocks(data: object, path: str) -> None:
    """Check that data is a mapping of blocks, each a mapping of parts, each a mapping of keys.

    Raises:
        ConfigError: it is not; a part may be null.
    """
    for name, block in _mapping(data, path).items():
        for slot, part in _mapping(block, f"{path}.{name}").items():
            if part is not None:
                _mapping(part, f"{path}.{name}.{slot}")


def _load_fields(kind: Any, data: object, path: str) -> Any:  # noqa: ANN401
    given = dict(_renamed(_mapping(data, path), path))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if "kind" not in fields and hasattr(kind, "kind"):
        given.pop("kind", None)
    hints = typing.get_type_hints(kind, include_extras=True)
    where = f"{path}." if path else ""
    for key in given:
        if key not in fields:
            raise ConfigError(f"unknown key {where}{key}; {suggest(str(key), list(fields))}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if name not in given and required:
            raise ConfigError(f"{where}{name} is missing; it has no default, give it a value")
    values = {name: _load(hints[name], value, f"{where}{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def _resolve_kind(kind: Any, data: object, path: str) -> Any:  # noqa: ANN401
    known = kinds_of(kind)
    if known is None:
        return kind
    name = _mapping(data, path).get("kind")
    if name is None:
        raise ConfigError(f"{path}.kind is missing; choose from {', '.join(known)}")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{path}.kind {name!r} is unknown; {suggest(str(name), list(known))}")
    return known[name]


def _load_scalar(kind: type, data: object, path: str) -> object:
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not math.isfinite(data):
            raise ConfigError(f"{path} is {data!r}; write a finite number")
        return float(data)
    if kind is int and isinstance(data, float) and data.is_integer():
        data = int(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        wanted = _WANTED.get(kind, f"a {kind.__name__}")
        raise ConfigError(f"{path} is {data!r}, a {type(data).__name__}; write {wanted}")
    if isinstance(data, int) and abs(data) > LARGEST_INT:
        raise ConfigError(f"{path} is {data}, beyond 2^63 - 1; write a smaller number")
    return data


def _mapping(data: object, path: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'config'} is {data!r}; write a mapping of keys to values")
    return data


def _renamed(data: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    moved = {}
    for key, value in data.items():
        new = RENAMED.get(f"{path}.{key}" if path else key, key)
        if new:
            moved[new.rpartition(".")[2]] = value
    return moved


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}  # type: ignore[attr-defined]
        named = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {**kind, **named}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
