"""What YAML files may say: every key that `trainer.schema.load` accepts, read off the schema.

A field's meaning is the string literal below it, or its line in the class's `Attributes:`.
"""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from trainer.schema import kinds_of


@dataclass(frozen=True)
class Key:
    """One key of a YAML file.

    Attributes:
        path: from the top of the file, with dots; `<name>` stands for a name the user chooses.
        kind: the `kind` of the mapping it belongs to, where there are several kinds.
        type: in words.
        default: as YAML writes it; None where there is none.
        required: whether the key must be given; in sections of a sweep the program fills it in.
        doc: what it means.
    """

    path: str
    kind: str
    type: str
    default: str | None
    required: bool
    doc: str


@dataclass(frozen=True)
class Group:
    """The keys of one config class at one place.

    Attributes:
        path: the mapping that holds them; empty at the top of a file.
        kind: its `kind`, where there are several.
        doc: first paragraph of the class.
        config: the class.
        keys: in the order of the class.
        same_as: the path whose groups hold here too, listed once; the group has then no keys.
    """

    path: str
    kind: str
    doc: str
    config: type
    keys: tuple[Key, ...] = ()
    same_as: str = ""


def list_keys(config: type) -> list[Group]:
    """Every key of a file that `config` describes: its own, those of its sections, the rest.

    A family of mixers or a section is listed where it is first met: mixers may hold mixers, and
    ladders repeat the sections of their sweep.
    """
    return list(_groups(config, "", {}, partial=False))


@functools.cache
def field_docs(config: type) -> Mapping[str, str]:
    """What each field of a config class means, by its name; a field without words is left out."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _attributes(inspect.getdoc(base) or "") | _literals(base)
    return {f.name: docs[f.name] for f in dataclasses.fields(config) if f.name in docs}


def _groups(config: type, path: str, seen: dict[type, str], *, partial: bool) -> Iterator[Group]:
    family = kinds_of(config)
    if config in seen:
        yield Group(path, "", "", config, same_as=seen[config])
        return
    if family is not None or partial:
        seen[config] = path
    if family is None:
        yield from _one_class(config, path, "", seen, partial=partial)
        return
    kinds = f"one of {', '.join(family)}"
    kind = Key(f"{path}.kind", "", kinds, None, True, "Which of the kinds below it is.")
    yield Group(path, "", _first_paragraph(config), config, (kind,))
    for name, each in family.items():
        yield from _one_class(each, path, name, seen, partial=partial)


def _one_class(
    config: type, path: str, kind: str, seen: dict[type, str], *, partial: bool
) -> Iterator[Group]:
    """The keys of a class, then those of the config classes that its fields hold."""
    hints = typing.get_type_hints(config, include_extras=True)
    where = f"{path}." if path else ""
    docs = field_docs(config)
    keys, below = [], []
    for each in dataclasses.fields(config):
        hint, default = hints[each.name], _default(each)
        inner = _nested(hint, f"{where}{each.name}")
        if inner is not None:
            below.append(inner)
        keys.append(
            Key(
                f"{where}{each.name}",
                kind,
                _type_words(hint),
                default,
                default is None and not partial,
                docs.get(each.name) or (_first_paragraph(inner.config) if inner else ""),
            )
        )
    yield Group(path, kind, _first_paragraph(config), config, tuple(keys))
    # Sections first: what ladders repeat of them is then a reference.
    for inner in sorted(below, key=lambda each: not each.section):
        yield from _groups(inner.config, inner.path, seen, partial=partial or inner.section)


class _Nested(NamedTuple):
    """The config class that a field holds, its path, and whether it is a section of a sweep."""

    config: type
    path: str
    section: bool


def _nested(hint: object, path: str) -> _Nested | None:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _Nested(hint, path, section=False)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return _Nested(arguments[1], path, section=True)
    if typing.get_origin(hint) is dict:
        return _nested(arguments[1], f"{path}.<name>")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(filter(None, (_nested(each, path) for each in arguments)), None)
    return None


def _type_words(hint: object) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else _type_words(a) for a in arguments)
    if origin is tuple:
        return f"list of {_type_words(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type_words(arguments[1])}"
    if origin is Annotated or hint is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    assert isinstance(hint, type), hint
    return hint.__name__


def _default(field: dataclasses.Field) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "{}" if dataclasses.is_dataclass(made) else _yaml(made)
    return None


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _first_paragraph(config: type) -> str:
    return " ".join((inspect.getdoc(config) or "").partition("\n\n")[0].split())


def _literals(config: type) -> dict[str, str]:
    """The string literals that stand below the fields of a class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        if isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def _attributes(doc: str) -> dict[str, str]:
    """The `Attributes:` of a Google-style docstring; `a, b: text` holds for both."""
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in doc.partition("Attributes:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        text = line.strip()
        if not line.startswith("     "):
            head, _, text = text.partition(": ")
            names = head.split(", ")
        docs |= {name: f"{docs.get(name, '')} {text}".strip() for name in names}
    # YAML has null for None.
    return {
        name: re.sub(r"\bNone\b", "null", doc[:1].upper() + doc[1:]) for name, doc in docs.items()
    }
