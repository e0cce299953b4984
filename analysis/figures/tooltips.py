"""Which run a point of a drawing is: the texts that a browser shows under the pointer.

A drawing carries them as the ids of its groups of markers while it is made; in the SVG each marker
then gets its own `title`, which needs no script.
"""

import json
import re
from xml.sax.saxutils import escape

import pandas as pd

from analysis.words.numbers import with_unit

_MARK = "runs-"
_PARTS = (
    ("architecture", "{}"), ("corpus", "on {}"), ("seed", "seed {}"), ("parameters", "N = {}"),
    ("tokens", "D = {}"), ("flops", "C = {} FLOP"), ("loss_nats", "loss {} nats"),
)  # fmt: skip


def mark(rows: pd.DataFrame) -> str:
    """The id of the markers of these rows, in their order; what is not known is left out."""
    texts = [_text(row) for row in rows.to_dict("records")]
    return _MARK + json.dumps(texts).encode().hex()


def with_titles(svg: str) -> str:
    """Give each marker its text; groups that drew fewer markers than rows are left without."""
    return re.sub(rf'<g id="{_MARK}(\w*)">(.*?)</g>\s*</g>', _titled, svg, flags=re.DOTALL)


def without_titles(svg: str) -> str:
    """The drawing without what its groups of markers carry, for pages without a pointer."""
    return re.sub(rf' id="{_MARK}\w*"', "", svg)


def _text(row: dict) -> str:
    known = [(words, row[name]) for name, words in _PARTS if name in row and not pd.isna(row[name])]
    return ", ".join(words.format(_value(value)) for words, value in known)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    number = float(str(value))
    return with_unit(number) if abs(number) >= 1e3 else f"{number:.4g}"


def _titled(match: re.Match) -> str:
    texts, body = json.loads(bytes.fromhex(match[1])), match[2]
    uses = re.findall(r"<use [^>]*/>", body)
    if len(uses) == len(texts):
        remaining = iter(texts)
        body = re.sub(
            r"<use ([^>]*)/>",
            lambda use: f"<use {use[1]}><title>{escape(next(remaining))}</title></use>",
            body,
        )
    return f"<g>{body}</g></g>"
