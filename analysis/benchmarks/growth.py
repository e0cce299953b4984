"""Growth of a mixer's time and memory with sequence length: exponents and figure."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.inference.intervals import slope_and_error
from analysis.tables.frames import floats, groups, keep

SHORTEST = 4096
"""Shorter sequences are dominated by fixed costs."""
UNITS = {"seconds": 1e6, "bytes": 1e-3}
"""Factors from the table's units to the figure's, microseconds and kilobytes."""


def exponents(points: pd.DataFrame, shortest: int = SHORTEST) -> pd.DataFrame:
    """Slopes of log time and log memory on log length of each mixer, with standard errors.

    The errors are those of a straight line through one point a length; NaN for two points.

    Args:
        points: mixer, length, seconds and bytes of each.
        shortest: lengths below are left out.
    """
    rows = []
    for (mixer,), line in groups(keep(points, points["length"] >= shortest), ["mixer"]):
        if len(line) < 2:
            continue
        lengths = np.log(floats(line, "length"))
        row: dict[str, object] = {"mixer": mixer, "longest": int(floats(line, "length")[-1])}
        for column in ("seconds", "bytes"):
            slope, error = slope_and_error(lengths, np.log(floats(line, column)))
            row |= {column: slope, f"{column}_error": error}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(points: pd.DataFrame, name: str) -> ReportFigure:
    """Time and memory of a token against length, each line with the exponent of the whole.

    A line is level where the whole grows as its length does.
    """
    slopes = exponents(points, 0)
    with panels.styled():
        figure = Figure(figsize=(13.0, 5.6), layout="constrained")
        time, memory = figure.subplots(1, 2)
        _draw(time, points, slopes, "seconds")
        time.set_ylabel("CPU time of one thread, forward and backward [us / token]")
        _draw(memory, points, slopes, "bytes")
        memory.set_ylabel("peak memory above the weights [kB / token]")
        title = "Growth of one mixer, forward and backward, with the length"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    caption = (
        "One process per point. Linear growth is a level line. Numbers: exponents of total "
        "time and memory over all lengths. A line ends where a point took too long or too much "
        "memory."
    )
    return ReportFigure(name, title, caption, figure, points)


def _draw(ax: Axes, points: pd.DataFrame, slopes: pd.DataFrame, column: str) -> None:
    known = {row["mixer"]: row[column] for row in slopes.to_dict("records")}
    ends: panels.Labels = {}
    for i, ((mixer,), line) in enumerate(groups(points, ["mixer"])):
        colour = panels.COLOURS[i % len(panels.COLOURS)]
        marker = panels.MARKERS[i % len(panels.MARKERS)]
        x = floats(line, "length")
        y = UNITS[column] * floats(line, column) / x
        ax.plot(x, y, marker=marker, color=colour, ms=4.0, lw=1.3)
        label = f"{mixer} {known[mixer]:.2f}" if mixer in known else str(mixer)
        ends[label] = (x[-1], y[-1], colour)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    lengths = sorted(int(each) for each in points["length"].unique())
    ax.xaxis.set_major_locator(FixedLocator([float(each) for each in lengths]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}k"))
    ax.set_xlabel("length [tokens]")
    panels.label_ends(ax, ends)
