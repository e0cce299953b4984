"""Traffic between ranks that share a sequence: the figure of bytes and of times."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep

TITLE = "States and windows cost the same at any length; keys, channels and checkpoints grow"


CAPTION = (
    "Left: forward and back, the rank that sends most, states gathered. Middle: one way; states in "
    "float32, tokens in bfloat16. Right: there and back, states of the middle's size."
)


def draw(points: pd.DataFrame, name: str, titles: Mapping[str, str]) -> ReportFigure:
    """Draw bytes against length, measured and at published size, and time against ranks.

    Args:
        points: `panel` measured, size or time; `line`, `x` and `y`.
        name: of the files.
        titles: what each panel shows.
    """
    labels = {
        "measured": ("length [tokens]", "sent by a rank for one layer, both ways [bytes]"),
        "size": ("length [tokens]", "sent by a rank for one layer, one way [bytes]"),
        "time": ("ranks", "time of the states' way, there and back [s]"),
    }
    with panels.styled():
        figure = Figure(figsize=(16.5, 5.6), layout="constrained")
        axes = figure.subplots(1, 3)
        for ax, (panel, (across, up)) in zip(axes, labels.items(), strict=True):
            lines = keep(points, points["panel"] == panel)
            _draw(ax, _one_of_each(lines) if panel == "measured" else lines)
            ax.set_xlabel(across)
            ax.set_ylabel(up)
            ax.set_title(titles[panel], loc="left", fontsize=10)
        figure.suptitle(TITLE, x=0.01, ha="left", fontsize=11.5)
    return ReportFigure(name, TITLE, CAPTION, figure, points)


def _one_of_each(points: pd.DataFrame) -> pd.DataFrame:
    """One line for each kind of mixer: the first architecture's that has it, states gathered."""
    kinds = points["line"].str.replace(r"^[^:]*: ", "", regex=True)
    gathered = points.assign(line=kinds.str.replace(", gather", "", regex=False))
    gathered = keep(gathered, ~gathered["line"].str.contains(","))
    return gathered.drop_duplicates(["line", "x"])


def _draw(ax: Axes, points: pd.DataFrame) -> None:
    ends: panels.Labels = {}
    for i, ((line,), these) in enumerate(groups(points, ["line"])):
        colour = panels.COLOURS[i % len(panels.COLOURS)]
        marker = panels.MARKERS[(i + i // len(panels.COLOURS)) % len(panels.MARKERS)]
        dashed = "--" if i >= len(panels.COLOURS) else "-"
        x, y = floats(these, "x"), floats(these, "y")
        ax.plot(x, y, marker=marker, color=colour, ms=4.0, lw=1.3, ls=dashed)
        ends[str(line)] = (x[-1], y[-1], colour)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    panels.label_ends(ax, ends)
