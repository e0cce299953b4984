"""Which text of a file is worth reading, and for what: the filters of the embedded corpus."""

import ast
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_BYTES, MAX_BYTES = 200, 400_000
MAX_LINE, MAX_MEAN_LINE = 1_000, 120
MIN_LETTERS = {"python": 0.4, "cpp": 0.4, "prose": 0.55}
MIN_DOCSTRING = 60
PROSE_SHARE = 0.2
"""Share of a file between triple quotes below which its docstrings are not worth parsing for."""
GENERATED = re.compile(
    r"@generated|auto[- ]?generated|automatically generated|generated (by|from|using|automatically)"
    r"|do not edit|do not modify",
    re.IGNORECASE,
)
HEADER = 2_000
"""Characters in which a file says that it is generated."""

_TRIPLE = re.compile(r'"""(?:.|\n)*?"""' + r"|'''(?:.|\n)*?'''")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
"""What a string escape can hold and UTF-8 cannot."""


@dataclass(frozen=True)
class ExtractedText:
    """A text worth reading: the domain it belongs to, and where it was found."""

    domain: str
    text: str
    origin: str
    digest: bytes


@dataclass(frozen=True)
class SourceFile:
    """A file of a package, by its path here and its name inside the package."""

    path: str
    name: str
    package: str


@dataclass(frozen=True)
class Chunk:
    """Files to read, and the domains that still want text."""

    files: tuple[SourceFile, ...]
    domains: frozenset[str]


def read_chunk(chunk: Chunk) -> list[ExtractedText]:
    """The texts in some files; run in a worker."""
    found = []
    for file in chunk.files:
        try:
            source = Path(file.path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            # Other encodings are left out; pip lists a few files that it does not install.
            continue
        for domain, text in _texts(source, chunk.domains):
            if is_worth_reading(text, domain):
                found.append(extracted(domain, text, f"{file.package}:{file.name}"))
    return found


def is_worth_reading(text: str, domain: str) -> bool:
    """Whether a text is neither near-empty, nor generated, nor a table of numbers."""
    if not MIN_BYTES <= len(text) <= MAX_BYTES or GENERATED.search(text, 0, HEADER):
        return False
    if _SURROGATE.search(text):
        return False
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE or len(text) > MAX_MEAN_LINE * len(lines):
        return False
    visible = "".join(text.split())
    letters = sum(map(str.isalpha, visible))
    return len(visible) >= MIN_BYTES / 2 and letters >= MIN_LETTERS[domain] * len(visible)


def take_docstrings(source: str) -> tuple[str, str]:
    """Split Python source into the code without docstrings and the docstrings.

    Raises:
        SyntaxError, ValueError, RecursionError: it is no Python of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.split("\n")
    found = []
    for body in _bodies(tree):
        text = body[0].value.value
        first, last = body[0].lineno - 1, body[0].end_lineno
        found.append((first, inspect.cleandoc(text)))
        alone = "pass" if len(body) == 1 else ""
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        lines[first:last] = [indent + alone] if alone else [""]
        lines[first + 1 : first + 1] = [""] * (last - first - 1)
    prose = "\n\n".join(text for _, text in sorted(found) if len(text) >= MIN_DOCSTRING)
    code = re.sub(r"\n[ \t]*\n(?:[ \t]*\n)+", "\n\n\n", "\n".join(lines))
    return code.strip("\n") + "\n", prose


def extracted(domain: str, text: str, origin: str) -> ExtractedText:
    """A text with its hash, by which equal ones are found."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return ExtractedText(domain, text, origin, digest)


def _bodies(tree: ast.Module) -> Iterator[list]:
    """Every body that opens with a docstring on lines of its own."""
    stack: list = [tree]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    while stack:
        node = stack.pop()
        body = node.body
        if isinstance(node, kinds) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            alone = getattr(node, "lineno", 0) != body[0].lineno and not (
                len(body) > 1 and body[1].lineno == body[0].end_lineno
            )
            if alone and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield body
        for part in ("body", "orelse", "finalbody", "handlers"):
            stack += [child for child in getattr(node, part, ()) if hasattr(child, "body")]


def _texts(source: str, domains: frozenset[str]) -> Iterator[tuple[str, str]]:
    if "cpp" in domains:
        yield "cpp", source
        return
    if len(source) > MAX_BYTES or GENERATED.search(source, 0, HEADER):
        return
    quoted = sum(len(match.group()) for match in _TRIPLE.finditer(source))
    wants_prose = "prose" in domains and quoted > PROSE_SHARE * len(source)
    if "python" not in domains and not wants_prose:
        return
    try:
        code, prose = take_docstrings(source)
    except (SyntaxError, ValueError, RecursionError):
        # Templates and Python of other versions lie in some packages.
        return
    if "python" in domains:
        yield "python", code
    if wants_prose:
        yield "prose", prose
