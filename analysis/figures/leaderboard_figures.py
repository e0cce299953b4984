"""The figures of many arms: losses side by side, and loss against learning rate."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.effects.leaderboard import IDENTITY, Comparison, arms_table, verdict
from analysis.effects.learning_rates import search_table, trials
from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, keep, strings, where
from analysis.tables.run_table import Table
from analysis.words.leaderboard import caption
from analysis.words.learning_rates import cells_of, equal_trials
from analysis.words.numbers import with_unit

LINE_STYLES = ("--", ":", "-.")
LABEL_WIDTH = 0.16
"""Of a line's name, as a share of the panel."""


def draw_arms(comparisons: tuple[Comparison, ...], neutral_set: str) -> list[ReportFigure]:
    """The dot plot of every place, as one plate; none without finished arms."""
    if not comparisons:
        return []
    heights = [1.1 + 0.3 * len(each.arms) for each in comparisons]
    with panels.styled():
        figure = Figure(figsize=(8.8, sum(heights)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(comparisons), 1, height_ratios=heights))
        for ax, comparison in zip(axes, comparisons, strict=True):
            plot_arms(ax, comparison)
            ax.set_xlabel(f"loss on {neutral_set} [nats per token]")
    texts = [f"{_place_words(each)}: {caption(each)}" for each in comparisons]
    text = "Marks: means" + (" with intervals" if any(c.freedom for c in comparisons) else "")
    text += "; thin bars: one per seed; vertical lines: baselines. " + " ".join(texts)
    title = _arms_title(comparisons)
    return [ReportFigure("architectures", title, text, figure, arms_table(comparisons))]


def draw_rates(table: Table) -> list[ReportFigure]:
    """Loss against learning rate, a panel per rung, as one plate; none without trials."""
    tried = trials(table)
    if not len(tried):
        return []
    cells = list(cells_of(tried))
    with panels.styled():
        figure = Figure(figsize=(1.6 + 4.3 * len(cells), 4.4), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(cells)))
        ends = {}
        for ax, (name, rows) in zip(axes, cells, strict=True):
            ax.set_title(name)
            ends[ax] = plot_rates(ax, rows, table.levels("architecture"))
        axes[0].set_ylabel(f"loss on {table.neutral_set} [nats per token]")
        for ax, labels in ends.items():
            panels.label_ends(ax, labels)
    summary = search_table(table)
    repeats = int(floats(tried, "runs").max())
    seeds = "One run a point: no interval" if repeats == 1 else f"Means of up to {repeats} seeds"
    text = (
        f"n = {len(tried)} trials, final loss after decay. Rings: best trial of each line; "
        "crosses at the top: diverged. "
        f"{seeds}, so small differences between neighbouring rates may be seed noise. "
        f"{equal_trials(summary)}"
    )
    return [ReportFigure("learning_rates", _rates_title(summary), text, figure, tried)]


def plot_arms(ax: Axes, comparison: Comparison) -> None:
    """Arms from best to worst: seeds as small bars, means with intervals, lines to beat."""
    ax.set_title(_place_words(comparison), pad=4 + 11 * len(comparison.lines))
    names = [arm.architecture for arm in comparison.arms]
    for place, arm in enumerate(comparison.arms):
        colour = panels.FAINT if arm.architecture == IDENTITY else panels.COLOURS[0]
        seeds = np.full(len(arm.seeds), place + 0.27)
        ax.plot(arm.seeds, seeds, "|", color=colour, ms=6, mew=1.1, alpha=0.8)
        if np.isfinite(arm.loss.low):
            ends = [arm.loss.low, arm.loss.high]
            ax.plot(ends, [place, place], color=colour, lw=2.4, solid_capstyle="butt")
        ax.plot(arm.loss.estimate, place, "o", color=colour, ms=6.5, mec=panels.PAPER, mew=0.8)
    _plot_lines(ax, comparison.lines)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def plot_rates(ax: Axes, rows: pd.DataFrame, architectures: list[str]) -> panels.Labels:
    """One line per architecture over log2 of the learning rate, its best trial ringed."""
    ends: panels.Labels = {}
    for name, colour, marker in panels.looks(architectures):
        mine = where(rows, "architecture", name).sort_values("learning_rate")
        diverged = floats(keep(mine, mine["diverged"].astype(bool)), "learning_rate")
        # An empty line that is not clipped has no bounds, and breaks the layout.
        if len(diverged):
            ax.plot(
                diverged, np.ones(len(diverged)), "x", color=colour, ms=6, clip_on=False,
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip
        line = mine.dropna(subset=["loss_nats"])
        if not len(line):
            continue
        x, y = floats(line, "learning_rate"), floats(line, "loss_nats")
        ax.plot(x, y, marker + "-", color=colour, lw=1.5, ms=4.5, mec=panels.PAPER, mew=0.5)
        best = int(y.argmin())
        ax.plot(x[best], y[best], "o", ms=10, mfc="none", mec=colour, mew=1.3)
        ends[name] = (float(x[-1]), float(y[-1]), colour)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.margins(x=0.05, y=0.06)
    ax.set_xlabel("peak learning rate")
    panels.rate_ticks(ax, np.unique(floats(rows, "learning_rate")))
    panels.loss_ticks(ax)
    return ends


def _plot_lines(ax: Axes, lines: Mapping[str, float]) -> None:
    """Vertical lines with their names on top, one above the other where they would overlap."""
    for place, loss in enumerate(sorted(lines.values())):
        ax.axvline(loss, color=panels.INK, lw=1.0, ls=LINE_STYLES[place % 3], zorder=1)
    left, right = ax.get_xlim()
    before, height = -np.inf, 0
    for name, loss in sorted(lines.items(), key=lambda item: item[1]):
        height = height + 1 if loss - before < LABEL_WIDTH * (right - left) else 0
        before = loss
        ax.annotate(
            f"{name} {loss:.3f}", (loss, 1.0), xycoords=ax.get_xaxis_transform(), fontsize=8.5,
            xytext=(0, 3 + 11 * height), textcoords="offset points", ha="center",
        )  # fmt: skip


def _place_words(comparison: Comparison) -> str:
    place = comparison.place
    return f"{place.rung} on {place.corpus}, {with_unit(place.tokens)} tokens"


def _arms_title(comparisons: tuple[Comparison, ...]) -> str:
    largest = comparisons[-1]
    best, loss = largest.arms[0].architecture, largest.arms[0].loss.estimate
    text = f"Lowest loss at {largest.place.rung}: {best}, {loss:.3f} nats"
    if not largest.freedom:
        return f"{text}, one seed per arm"
    beaten = [
        f"{sum(verdict(arm.against[name]) == 'beats' for arm in judged)} of {len(judged)} "
        f"beat the {name} {'arm' if name == IDENTITY else 'line'}"
        for name in largest.lines
        if (judged := [arm for arm in largest.arms if arm.architecture != IDENTITY])
    ]
    return "; ".join([text, *beaten])


def _rates_title(summary: pd.DataFrame) -> str:
    inside = int(np.sum(strings(summary, "optimum") == "interior"))
    return f"The best learning rate is bracketed in {inside} of {len(summary)} cells"
