"""A figure laid out again for a narrow page: panels that were side by side are stacked."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

WIDTH = 4.8
"""Inches. On a phone of 390 pixels letters are then about ten pixels high."""
_LEGEND_COLUMNS = 2
_GAP = 0.09
"""Inches above and below a panel."""


def narrow_svg(figure: Figure) -> str:
    """The SVG of a figure in the narrow layout, which the figure keeps."""
    rows = _side_by_side(figure)
    height = figure.get_figheight()
    if len(rows) > 1:
        _stack(figure, rows)
        height *= len(rows)
    figure.set_size_inches(WIDTH, height)
    for legend in figure.legends:
        legend.set_ncols(_LEGEND_COLUMNS)
    # Two solutions: the second sees tick labels and legends in the places that the first gave them.
    figure.set_layout_engine("constrained", h_pad=_GAP)
    figure.draw_without_rendering()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _side_by_side(figure: Figure) -> list[list[Axes]]:
    """The panels of a row from left to right, each with the axes that lie on top of it."""
    columns: dict[int, list[Axes]] = {}
    for ax in figure.axes:
        place = ax.get_subplotspec()
        if place is not None and place.get_gridspec().ncols > 1:
            columns.setdefault(place.colspan.start, []).append(ax)
    return [columns[column] for column in sorted(columns)]


def _stack(figure: Figure, panels: list[list[Axes]]) -> None:
    grid = GridSpec(len(panels), 1, figure=figure)
    first = panels[0][0]
    for place, axes in enumerate(panels):
        for ax in axes:
            ax.set_subplotspec(grid[place, 0])
        ax = axes[0]
        if first.get_shared_y_axes().joined(first, ax):
            # A row names its common axis once; a column has to name it on each panel.
            ax.tick_params(axis="y", labelleft=True)
            ax.set_ylabel(first.get_ylabel())
