"""YAML text to plain data and back, with limits that hold before memory is taken.

Words mean what they say: only `true`, `false`, `null` and decimal numbers are not text, so that a
domain `no`, a tracker `off` and a seed `010` are never turned into something else. Keys are text.
Tags, interpolations such as `${oc.env:HOME}` and keys given twice are refused.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 50_000
"""Scalars, lists and mappings, those behind an alias counted at each use."""
MAX_DIGITS = 64

_WHOLE = r"(?:0|[1-9](?:_?[0-9])*)"
_INT = re.compile(rf"[-+]?{_WHOLE}")
_EXPONENT = r"[eE][-+]?[0-9]{1,3}"
# Without a point or a sign, as in 2e5, both sides are short: 1234e5678901 is the id of a run, which
# other writers of YAML leave unquoted.
_SHORT = r"[0-9]{1,6}[eE](?:[0-9]{1,2}|[-+][0-9]{1,3})"
_FLOAT = re.compile(
    rf"[-+]?(?:{_WHOLE}\.[0-9]*(?:{_EXPONENT})?|\.[0-9]+(?:{_EXPONENT})?|{_SHORT}|{_WHOLE})"
)
_WORDS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys((".inf", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}


class YAMLTextError(ValueError):
    """A text is not YAML that a config needs, or is beyond a limit."""


def parse_yaml(text: str) -> Any:  # noqa: ANN401
    """The plain data of one YAML document; None for an empty one.

    Raises:
        YAMLTextError: says in one line what is wrong, and where.
    """
    if len(text) > MAX_BYTES:
        raise YAMLTextError(f"it has more than {MAX_BYTES} characters, too large for a config")
    try:
        return _Builder(text).document()
    except yaml.YAMLError as error:
        raise YAMLTextError(_one_line(error)) from error


def dump_yaml(plain: object) -> str:
    """Plain data as YAML, which `parse_yaml` and any YAML 1.1 reader read back as the same."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


class _Builder:
    """Builds data from the parser's events, which come one by one and are counted first."""

    def __init__(self, text: str) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=loader)
        self._anchors: dict[str, tuple[object, int]] = {}
        self._nodes = 0

    def document(self) -> object:
        """The only document of the text."""
        made = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _error(event, "a second document begins; give one")
                made = self._node(next(self._events), 0)
        return made

    def _node(self, event: yaml.Event, depth: int) -> object:
        """The value that begins with an event."""
        before = self._nodes
        self._count(event, 1)
        if depth > MAX_DEPTH:
            raise _error(event, f"it is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if getattr(event, "tag", None) is not None:
            raise _error(event, f"the tag {event.tag} is not read; write plain values")  # type: ignore[attr-defined]
        if isinstance(event, yaml.ScalarEvent):
            made = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            made = self._sequence(depth)
        else:
            made = self._mapping(depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._anchors[anchor] = (made, self._nodes - before)
        return made

    def _alias(self, event: yaml.AliasEvent) -> object:
        if event.anchor not in self._anchors:
            raise _error(event, f"the alias *{event.anchor} has no finished anchor before it")
        made, nodes = self._anchors[event.anchor]
        self._count(event, nodes)
        return made

    def _sequence(self, depth: int) -> list[object]:
        made = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            made.append(self._node(event, depth + 1))
        return made

    def _mapping(self, depth: int) -> dict[str, object]:
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise _error(event, "a key is not a plain word; write key: value")
            self._count(event, 1)
            key, value = _text(event), self._node(next(self._events), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged |= _merged(event, value)
            elif key in own:
                raise _error(event, f"found duplicate key {key}; keep one of the two")
            else:
                own[key] = value
        return {**merged, **own}

    def _count(self, event: yaml.Event, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise _error(event, f"it has more than {MAX_NODES} values, too many for a config")


_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    """Quotes every text that `parse_yaml` or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, _data: object) -> bool:
        """Write out each value."""
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _scalar(event: yaml.ScalarEvent) -> object:
    text = _text(event)
    # Quoted text is text, whatever it looks like.
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise _error(event, f"a number has {len(text)} characters, more than {MAX_DIGITS}")
    return int(text) if _INT.fullmatch(text) else float(text)


def _text(event: yaml.ScalarEvent) -> str:
    if "${" in event.value:
        raise _error(event, f"{event.value[:80]!r} is an interpolation; write the value itself")
    return event.value


def _merged(event: yaml.Event, value: object) -> dict[str, object]:
    """What `<<: *other` brings in; of several mappings the first wins."""
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, dict) for part in parts):
        raise _error(event, "<< merges mappings only")
    return {key: part[key] for part in reversed(parts) for key in part}  # type: ignore[union-attr]


def _error(event: yaml.Event, problem: str) -> YAMLTextError:
    return YAMLTextError(f"line {event.start_mark.line + 1}: {problem}")


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + " ".join(problem.split())
