"""The floors of each folder: what stands on what by its imports; `python -m tests.check --floors`.

An entry of a folder is a file or a subfolder in it. An entry that imports no other entry of its
folder is on floor 0, any other is one floor above the highest that it imports. Entries that import
each other in a circle share a floor and are named. Prints a table, and writes the drawing to
reports/floors.png.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "analysis", "models", "kernels", "trainer", "data_pipelines", "sweeps", "launch", "untrusted",
)  # fmt: skip
Edges = Mapping[str, frozenset[str]]
"""For each entry the others that it imports."""


@dataclass(frozen=True)
class Folder:
    """A folder's entries, lowest floor first.

    Attributes:
        floors: names of the entries on each floor.
        imports: pairs of entries of which one imports the other.
        circles: groups of entries that import each other.
    """

    name: str
    floors: tuple[tuple[str, ...], ...]
    imports: int
    circles: tuple[tuple[str, ...], ...]


def entry_edges(graph: grimp.ImportGraph, package: str) -> dict[str, frozenset[str]]:
    """The imports between the entries of a package, those inside an entry left out."""
    edges: dict[str, set[str]] = {child: set() for child in graph.find_children(package)}
    for module in graph.find_descendants(package):
        own = _entry(package, module)
        for imported in graph.find_modules_directly_imported_by(module):
            if imported.startswith(f"{package}.") and _entry(package, imported) != own:
                edges[own].add(_entry(package, imported))
    short = {name: name.removeprefix(f"{package}.") for name in edges}
    return {short[a]: frozenset(short[b] for b in to) for a, to in edges.items()}


def arrange(name: str, edges: Edges) -> Folder:
    """Put entries on floors; a circle counts as one entry."""
    reached = {entry: _reached(entry, edges) for entry in edges}
    group = {a: frozenset({a} | {b for b in reached[a] if a in reached[b]}) for a in edges}
    height: dict[frozenset[str], int] = {}

    def floor(members: frozenset[str]) -> int:
        if members not in height:
            below = {group[b] for a in members for b in edges[a]} - {members}
            height[members] = 1 + max(map(floor, below), default=-1)
        return height[members]

    rows: list[list[str]] = [[] for _ in range(1 + max(map(floor, group.values()), default=-1))]
    for entry in sorted(edges):
        rows[floor(group[entry])].append(entry)
    circles = sorted(tuple(sorted(members)) for members in set(group.values()) if len(members) > 1)
    imports = sum(len(to) for to in edges.values())
    return Folder(name, tuple(tuple(row) for row in rows), imports, tuple(circles))


def draw(folders: list[Folder], path: Path) -> None:
    """One row of text a floor, the highest on top, a panel a folder."""
    lines = [[_wrapped(row) for row in folder.floors] for folder in folders]
    heights = [sum(1 + text.count("\n") for text in rows) + len(rows) for rows in lines]
    figure = Figure(figsize=(11, 0.19 * sum(heights) + 0.6 * len(folders)), layout="constrained")
    axes = figure.subplots(len(folders), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, folder, rows, height in zip(axes, folders, lines, heights, strict=True):
        at = 0.0
        for number, text in enumerate(rows):
            size = 2 + text.count("\n")
            ax.axhspan(at, at + size - 0.25, color="0.93" if number % 2 else "0.86")
            ax.text(-0.01, at + size / 2, str(number), ha="right", va="center", fontsize=8)
            ax.text(0.01, at + size / 2, text, va="center", fontsize=8, family="monospace")
            at += size
        ax.set(xlim=(0, 1), ylim=(0, height), xticks=[], yticks=[])
        ax.set_title(_summary(folder), fontsize=10, loc="left")
        ax.set_frame_on(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show_floors(root: Path) -> int:
    """Print and draw the floors of every package; 1 if one has a circle."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    folders = [arrange(name, entry_edges(graph, name)) for name in PACKAGES]
    table = Table(box=None)
    table.add_column("folder")
    for column in ("entries", "floors", "imports", "circles"):
        table.add_column(column, justify="right")
    for each in folders:
        counts = (sum(map(len, each.floors)), len(each.floors), each.imports, len(each.circles))
        table.add_row(each.name, *map(str, counts))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for each in folders:
        for circle in each.circles:
            console.print(f"circle in {each.name}: {', '.join(circle)}")
    path = root / "reports" / "floors.png"
    draw(folders, path)
    console.print(f"drawn to {path}")
    return 1 if any(each.circles for each in folders) else 0


def _entry(package: str, module: str) -> str:
    return f"{package}.{module.removeprefix(f'{package}.').partition('.')[0]}"


def _reached(entry: str, edges: Edges) -> set[str]:
    found, waiting = set(), [entry]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _wrapped(names: tuple[str, ...], width: int = 100) -> str:
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 2 > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + name
    return "\n".join(lines)


def _summary(folder: Folder) -> str:
    entries = sum(map(len, folder.floors))
    circles = f", {len(folder.circles)} circle(s)" if folder.circles else ""
    return (
        f"{folder.name}/: {entries} entries on {len(folder.floors)} floors, "
        f"{folder.imports} imports between them{circles}"
    )
