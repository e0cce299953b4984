"""How results are drawn: each function draws given tables on given axes and computes nothing."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.effects.contrasts import Contrast
from analysis.figures.tooltips import mark
from analysis.tables.frames import floats, where
from analysis.validity.refusal import Refusal
from analysis.words.numbers import with_unit
from analysis.words.sentences import short_effect

# Neighbours differ in lightness (CIE L* 32, 58, 47, 27, 55, 42), so that they differ in grey print
# and for colour-blind readers; markers repeat the information.
COLOURS = ("#004e89", "#dd6b10", "#1b7f5c", "#5b2a6e", "#c9609a", "#8a5a00")
# What a dark page shows in their place (L* 59, 84, 67, 54, 79, 64).
DARK_COLOURS = ("#4794d8", "#ffc680", "#2fb58a", "#a56bc2", "#f7aed2", "#c19242")
MARKERS = ("o", "s", "^", "D", "v", "P")
FACTOR_COLOURS = {"corpus": COLOURS[1], "architecture": COLOURS[0]}
FACTOR_MARKERS = {"corpus": "D", "architecture": "o"}
INK, FAINT, RULE, PAPER = "#1b1f24", "#66707b", "#dfe3e8", "#fefefe"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "crossladder",
}
NEAR_THE_EDGE = 0.8
MOST_TICKS = 8
# Label of a line -> where the line ends, and its colour.
Labels = dict[str, tuple[float, float, str]]
_LEADING = {1: (1, 2, 5), 2: (1, 3), 4: (1,)}


def styled() -> AbstractContextManager:
    """A context in which figures take the project's look."""
    return mpl.rc_context(STYLE)  # type: ignore[arg-type]


def plot_runs(
    ax: Axes, rows: pd.DataFrame, axes: tuple[str, str], marker: str, colour: str
) -> None:
    """A marker for each run, which tells on a page what it is."""
    x, y = axes
    style = {"ms": 4.5, "mec": PAPER, "mew": 0.5, "lw": 0.8}
    ax.plot(rows[x], rows[y], marker, color=colour, gid=mark(rows), **style)


def plot_loss_against_compute(
    ax: Axes, rows: pd.DataFrame, curves: pd.DataFrame, architectures: Sequence[str]
) -> Labels:
    """Decayed points and, inside the data, each architecture's fitted frontier of one corpus."""
    ends: Labels = {}
    for name, colour, marker in looks(architectures):
        mine = where(rows, "architecture", name)
        plot_runs(ax, mine, ("flops", "loss_nats"), marker, colour)
        line = _curve(curves, "frontier", name)
        ax.plot(line["flops"], line["loss_nats"], color=colour, lw=1.8)
        if len(line):
            ends[name] = (*last(line, "flops"), colour)
        elif len(mine):
            ends[name] = (*last(mine.sort_values("flops"), "flops"), colour)
    log_axes(ax, "training compute C [FLOP]", "flops")
    return ends


def plot_loss_against_tokens(
    ax: Axes, rows: pd.DataFrame, trunks: pd.DataFrame, architectures: Sequence[str]
) -> Labels:
    """Trunk curves before decay, faint, and the decayed points of each horizon, solid."""
    ends: Labels = {}
    for name, colour, marker in looks(architectures):
        for _, trunk in where(trunks, "architecture", name).groupby("trunk_id"):
            line = trunk.sort_values("tokens")
            ax.plot(line["tokens"], line["loss_nats"], color=colour, lw=0.9, alpha=0.5)
        mine = where(rows, "architecture", name)
        for _, points in mine.groupby("trunk_id"):
            line = points.sort_values("tokens")
            label = with_unit(float(floats(line, "nominal_parameters")[0]))
            plot_runs(ax, line, ("tokens", "loss_nats"), marker + "-", colour)
            ends.setdefault(label, (*last(line, "tokens"), FAINT))
    log_axes(ax, "training tokens D", "tokens")
    return ends


def plot_loss_against_parameters(
    ax: Axes, rows: pd.DataFrame, curves: pd.DataFrame, architectures: Sequence[str]
) -> Labels:
    """One line per horizon and architecture: the fitted law through the decayed points."""
    ends: Labels = {}
    for name, colour, marker in looks(architectures):
        mine = where(rows, "architecture", name)
        plot_runs(ax, mine, ("parameters", "loss_nats"), marker, colour)
        for tokens, line in _curve(curves, "horizon", name).groupby("key"):
            ax.plot(line["parameters"], line["loss_nats"], color=colour, lw=1.2)
            label = f"{with_unit(float(str(tokens)))} tokens"
            ends.setdefault(label, (*last(line, "parameters"), FAINT))
    log_axes(ax, "parameters N", "parameters")
    return ends


def plot_effects(
    ax: Axes,
    effects: Mapping[str, Mapping[str, Sequence[Contrast | Refusal]]],
    noise_floor: float | None,
) -> None:
    """Corpus and architecture effects on each evaluation set, with intervals and sizes.

    `noise_floor` is the half-width of the band of differences too small to see, in ln L.
    """
    if noise_floor is not None:
        ax.axvspan(-100 * noise_floor, 100 * noise_floor, color=FAINT, alpha=0.14, lw=0)
    ax.axvline(0.0, color=FAINT, lw=0.9)
    labels = []
    for set_name, factors in effects.items():
        for factor, contrasts in factors.items():
            for contrast in contrasts:
                if isinstance(contrast, Contrast):
                    _effect(ax, contrast, float(len(labels)))
                    change = f"{factor}: {contrast.other} vs {contrast.baseline}"
                    labels.append(f"{change}\non {set_name}: {short_effect(contrast)}")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel("difference of loss [%]")
    ax.grid(axis="y", visible=False)


def plot_residuals(
    ax: Axes, rows: pd.DataFrame, variable: str, architectures: Sequence[str]
) -> None:
    """Residuals of ln L in percent against one variable, with the band of one percent."""
    ax.axhspan(-1, 1, color=FAINT, alpha=0.12, lw=0)
    ax.axhline(0.0, color=FAINT, lw=0.9)
    for name, colour, marker in looks(architectures):
        mine = where(rows, "architecture", name)
        values = 100 * floats(mine, "residual")
        ax.plot(mine[variable], values, marker, color=colour, ms=4, mec=PAPER, mew=0.4)
    ax.set_xscale("log")
    plain_ticks(ax, "x", variable)
    ax.xaxis.set_major_locator(FixedLocator(_spread(ax.get_xticks(), ax.get_xlim())))
    reach = max(1.2, *(abs(limit) for limit in ax.get_ylim()))
    ax.set_ylim(-reach, reach)
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _spread(ticks: np.ndarray, ends: tuple[float, float]) -> list[float]:
    """Every other tick where a narrow panel would run more than three together."""
    seen = [float(tick) for tick in ticks if ends[0] <= tick <= ends[1]]
    return seen[len(seen) % 2 :: 2] if len(seen) > 3 else seen


def label_ends(ax: Axes, ends: Labels) -> None:
    """Write each label right of its line's end on log axes, moved apart where they would overlap.

    A line that ends well before the edge has its label at its own end.
    Called when every panel is drawn, as panels that share an axis change each other's limits.
    """
    (left, right), (bottom, top) = np.log(ax.get_xlim()), np.log(ax.get_ylim())
    below = -np.inf
    for label, (x, y, colour) in sorted(ends.items(), key=lambda item: item[1][1]):
        across = (np.log(x) - left) / (right - left)
        height = (np.log(y) - bottom) / (top - bottom)
        if across < NEAR_THE_EDGE:
            place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(label, (x, y), fontsize=9, **place)
            continue
        below = max(height, below + 0.058)
        leader = [across + 0.015, 1.02], [height, below]
        ax.plot(*leader, color=colour, lw=0.8, transform=ax.transAxes, clip_on=False)
        ax.text(1.03, below, label, va="center", fontsize=9, transform=ax.transAxes)


def looks(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each name with its colour and its marker; beyond six, colours repeat with other markers."""
    return [
        (name, COLOURS[place % 6], MARKERS[(place + place // 6) % 6])
        for place, name in enumerate(names)
    ]


def _curve(curves: pd.DataFrame, kind: str, architecture: str) -> pd.DataFrame:
    return where(where(curves, "kind", kind), "architecture", architecture)


def last(line: pd.DataFrame, variable: str) -> tuple[float, float]:
    """Where a line ends."""
    return float(floats(line, variable)[-1]), float(floats(line, "loss_nats")[-1])


def _effect(ax: Axes, contrast: Contrast, place: float) -> None:
    percent = contrast.percent
    colour, marker = FACTOR_COLOURS[contrast.factor], FACTOR_MARKERS[contrast.factor]
    sizes = 100 * np.expm1(contrast.by_size.to_numpy())
    ax.plot(sizes, np.full(len(sizes), place + 0.28), "|", color=colour, ms=7, mew=1.2, alpha=0.75)
    ax.plot(
        [percent.low, percent.high], [place, place], color=colour, lw=2.6, solid_capstyle="butt"
    )
    ax.plot(percent.estimate, place, marker, color=colour, ms=7, mec=PAPER, mew=0.8)


def figure_of(ax: Axes) -> Figure:
    """The figure that an axes belongs to."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def log_axes(ax: Axes, label: str, variable: str) -> None:
    """Logarithmic axes with few, plain ticks; the vertical one is a loss."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(label)
    ax.margins(x=0.06, y=0.07)
    plain_ticks(ax, "x", variable)
    loss_ticks(ax)


def rate_ticks(ax: Axes, rates: np.ndarray) -> None:
    """Ticks at the rates that were tried, or at some of them."""
    shown = rates if len(rates) <= MOST_TICKS else rates[:: -(-len(rates) // MOST_TICKS)]
    ax.xaxis.set_major_locator(FixedLocator(shown.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))


def loss_ticks(ax: Axes) -> None:
    """Few, plain ticks on a logarithmic axis of losses."""
    low, high = ax.get_ylim()
    ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    ax.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def size_and_tokens(ax: Axes) -> None:
    """N across and D up, with room so that no point at an end is cut."""
    ax.use_sticky_edges = False
    ax.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="training tokens D")
    ax.margins(0.06)
    plain_ticks(ax, "x", "parameters")
    plain_ticks(ax, "y", "tokens")


def plain_ticks(ax: Axes, which: str, variable: str) -> None:
    """At most about six ticks, at round numbers, in SI units or powers of ten."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = np.log10(ax.get_xlim() if which == "x" else ax.get_ylim())
    leading = next(digits for span, digits in _LEADING.items() if high - low <= span or span == 4)
    if high - low < 0.9:
        leading = (1, 1.5, 2, 3, 5, 7)
    ticks = [
        digit * 10.0**power
        for power in range(int(np.floor(low)), int(np.ceil(high)) + 1)
        for digit in leading
        if low <= np.log10(digit) + power <= high
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    written = _power_of_ten if variable == "flops" else with_unit
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))


def _power_of_ten(value: float) -> str:
    power = int(np.floor(np.log10(value) + 1e-9))
    digit = value / 10.0**power
    lead = "" if abs(digit - 1) < 1e-9 else f"{digit:.2g}\u00d7"
    return f"${lead}10^{{{power}}}$".replace("\u00d7", r"\times ")
