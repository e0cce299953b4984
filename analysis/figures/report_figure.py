"""One figure of the report: how it is drawn, saved and described."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.narrow import narrow_svg
from analysis.figures.tooltips import with_titles, without_titles

RESOLUTION = 150


@dataclass(frozen=True)
class ReportFigure:
    """A figure ready to print: a finding as its title, a caption, the drawing and its data."""

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame

    def save(self, folder: Path) -> str:
        """Write PNG, SVG and CSV; returns the SVG text."""
        folder.mkdir(parents=True, exist_ok=True)
        with panels.styled():
            self.figure.savefig(folder / f"{self.name}.png", dpi=RESOLUTION)
            # The layout is settled now; solving it again for the second file costs seconds.
            self.figure.set_layout_engine("none")
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})
        self.data.to_csv(folder / f"{self.name}.csv", index=False, float_format="%.8g")
        drawn = folder / f"{self.name}.svg"
        text = with_titles(drawn.read_text())
        drawn.write_text(text)
        return text

    def narrow(self) -> str:
        """The SVG text for a narrow page. Call it after `save`: the figure keeps this layout."""
        with panels.styled():
            return without_titles(narrow_svg(self.figure))
