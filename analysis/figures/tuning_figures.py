"""The figure of a search over rate and batch: loss against rate, with the rule's rate marked."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.effects.learning_rates import edge, rungs_of
from analysis.effects.tuning_rule import CELL, Rules
from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep, means, strings, where
from analysis.words.numbers import with_unit

ROOM = 0.35
"""How far above a panel's lowest ln L a trial is still shown."""
_STYLES = ("-", "--", ":", "-.")


def draw_search(trials: pd.DataFrame, rules: Rules, own: pd.DataFrame) -> ReportFigure:
    """A panel per architecture and rung, a colour per horizon and a line style per batch."""
    names = list(dict.fromkeys(strings(trials, "architecture").tolist()))
    rungs = rungs_of(trials)
    horizons = np.unique(floats(trials, "horizon_tokens"))
    batches = np.unique(floats(trials, "batch_tokens"))
    with panels.styled():
        size = (1.2 + 3.4 * len(rungs), 0.9 + 3.0 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(names), len(rungs), squeeze=False)
        for line, name in zip(axes, names, strict=True):
            for ax, rung in zip(line, rungs, strict=True):
                mine = where(where(trials, "architecture", name), "rung", rung)
                ax.set_title(f"{name}, {rung}")
                if len(mine):
                    _panel(ax, mine, rules, horizons, batches)
            line[0].set_ylabel("loss [nats per token]")
        for ax in axes[-1]:
            ax.set_xlabel("peak learning rate")
        figure.legend(
            handles=_legend(horizons, batches), loc="outside lower center", ncols=4, frameon=False
        )
    open_cells = sum(bool(edge(cell, "learning_rate")) for _, cell in groups(trials, CELL))
    title = (
        f"The best learning rate is bracketed in {len(own) - open_cells} of {len(own)} cells of "
        "rate and batch"
    )
    caption = (
        f"n = {len(trials)} trials, one run each unless seeds repeat; final loss after decay. "
        "Circles: lowest trial of each line, hollow where it is at the edge of what was tried. "
        "Triangles at the bottom: the rule's rate for each line. Trials that diverged, or that end "
        f"more than {100 * np.expm1(ROOM):.0f} % above a panel's lowest, are left out."
    )
    return ReportFigure("rate_search", title, caption, figure, trials)


def _panel(
    ax: Axes, trials: pd.DataFrame, rules: Rules, horizons: np.ndarray, batches: np.ndarray
) -> None:
    finite = keep(trials, np.isfinite(floats(trials, "loss_nats")))
    floor = floats(finite, "loss_nats").min()
    for (horizon, batch), cell in groups(finite, ["horizon_tokens", "batch_tokens"]):
        colour = panels.COLOURS[int(np.searchsorted(horizons, horizon)) % 6]
        style = _STYLES[int(np.searchsorted(batches, batch)) % 4]
        line = means(cell, ["learning_rate"], ["loss_nats"]).sort_index().reset_index()
        x, y = floats(line, "learning_rate"), floats(line, "loss_nats")
        seen = y < floor * np.exp(ROOM + np.log(y.min() / floor))
        ax.plot(x[seen], y[seen], style, color=colour, lw=1.2, marker=".", ms=3)
        best = int(y.argmin())
        face = panels.PAPER if edge(cell, "learning_rate") else colour
        ax.plot(x[best], y[best], "o", ms=6, mfc=face, mec=colour, mew=1.2, zorder=3)
        if str(cell["architecture"].iloc[0]) in rules.architectures:
            rate = 2.0 ** rules.log2_rate(cell.iloc[:1])[0]
            ax.plot(
                rate, 0.02 + 0.05 * int(np.searchsorted(batches, batch)), "^", color=colour, ms=4.5,
                transform=ax.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.06, y=0.1)
    panels.loss_ticks(ax)
    panels.rate_ticks(ax, np.unique(floats(finite, "learning_rate")))


def _legend(horizons: np.ndarray, batches: np.ndarray) -> list[Line2D]:
    lines = [
        Line2D([], [], color=panels.COLOURS[place % 6], label=f"{with_unit(horizon)} tokens")
        for place, horizon in enumerate(horizons)
    ]
    styles = [
        Line2D([], [], color=panels.INK, ls=_STYLES[place % 4], label=f"batch {with_unit(batch)}")
        for place, batch in enumerate(batches)
    ]
    rule = Line2D([], [], color=panels.INK, marker="^", ls="", ms=4.5, label="the rule's rate")
    return [*lines, *styles, rule]
