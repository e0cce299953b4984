"""Paths made of names that came from a file, an argument or a user: they stay inside their folder.

Every such path is made by `inside`, before the first byte is written. tests/written_paths.py fails
a write whose path is not.
"""

import re
from pathlib import Path

NAME = re.compile(r"\w[\w.+%~-]*")
"""A plain file name: letters and digits of any script, then dots, dashes and the like."""
MAX_NAME_BYTES = 200


class PathError(ValueError):
    """A name or a file would lead out of its folder."""


def inside(folder: Path, *names: str) -> Path:
    """The path `folder/names...`, proven to lie in the folder.

    Raises:
        PathError: a name is not a plain file name, or a part of the path is a link.
    """
    path = folder
    for name in names:
        path = path / plain_name("a name", name)
        if path.is_symlink():
            raise PathError(
                f"{path} is a link, which could lead out of {folder}; put the file or folder "
                "itself there"
            )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PathError(f"{path} lies outside {folder}; use a plain name")
    return path


def plain_name(what: str, name: str) -> str:
    """The name, if it can be a file name.

    Raises:
        PathError: it cannot.
    """
    if not NAME.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise PathError(
            f"{what} {name[:80]!r} cannot be a file name; use letters, digits, dot, dash and "
            f"underscore, a letter or digit first, at most {MAX_NAME_BYTES} bytes"
        )
    return name


def refuse_links(folder: Path) -> None:
    """Check that nothing directly in a folder is a link, so that no write leaves it.

    Raises:
        PathError: names the link.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink():
            raise PathError(
                f"{path} is a link, and what is written to it would leave {folder}; remove it"
            )
