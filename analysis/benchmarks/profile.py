"""The figure of a training step's time: its profile beside two lower bounds of the same step."""

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep

TERMS = (
    "products",
    "attention kernel",
    "scans, convolutions",
    "FFT",
    "passes",
    "optimizer",
    "dispatch, Python",
)
BARS = ("profile", "bound as written", "least bound")


def draw(times: pd.DataFrame, name: str) -> ReportFigure:
    """Stacked bars, three a contender.

    Args:
        times: contender, bar, term and milliseconds; a term that a bar lacks takes none.
        name: of the figure's file.
    """
    contenders = list(dict.fromkeys(times["contender"]))
    title = "One training step: its profile beside the least time that its parts take"
    with panels.styled():
        figure = Figure(figsize=(10.0, 1.4 + 0.8 * len(contenders)), layout="constrained")
        ax = figure.add_subplot()
        colours = dict(zip(TERMS, (*panels.COLOURS, panels.FAINT), strict=True))
        left = dict.fromkeys(((c, b) for c in contenders for b in BARS), 0.0)
        for term in TERMS:
            rows = keep(times, times["term"] == term)
            first = True
            for (contender, bar), row in groups(rows, ["contender", "bar"]):
                place = (str(contender), str(bar))
                y = len(BARS) * 1.3 * contenders.index(place[0]) + BARS.index(place[1])
                width = float(floats(row, "milliseconds").sum())
                label = term if first else None
                ax.barh(y, width, 0.86, left[place], color=colours[term], label=label)
                left[place], first = left[place] + width, False
        ticks = [len(BARS) * 1.3 * i + j for i in range(len(contenders)) for j in range(len(BARS))]
        ax.set_yticks(ticks, [f"{c}  {b}" if b == BARS[0] else b for c in contenders for b in BARS])
        ax.invert_yaxis()
        ax.set_xlabel("milliseconds a step")
        ax.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    caption = (
        "Profile: the fastest of a few steps under torch's profiler. Bounds: products, attention "
        "and FFT run in the step's order with nothing between, bytes and exponentials over the "
        "machine's rates; least: passes fused."
    )
    return ReportFigure(name, title, caption, figure, times)
