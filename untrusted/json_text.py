"""JSON text to plain data, with limits that hold before memory is taken."""

import json
import re
from typing import Any

MAX_BYTES = 1 << 28
MAX_DEPTH = 64

_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def parse_json(text: str) -> Any:  # noqa: ANN401
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, too large, or nested too deeply.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} characters, more than the {MAX_BYTES} that are read")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _require_shallow(text)
    return json.loads(text)


def _require_shallow(text: str) -> None:
    depth = 0
    for found in _STRUCTURE.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
