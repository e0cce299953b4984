"""How fitted laws are drawn: frontiers to the wall, isoFLOP curves, contours, profiles, clouds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from analysis.compute_optimal.isoflop import IsoFlopCurve
from analysis.figures import panels
from analysis.figures.panels import (
    COLOURS,
    FAINT,
    INK,
    MARKERS,
    PAPER,
    log_axes,
    looks,
    plain_ticks,
)
from analysis.inference.profile_likelihood import Profile
from analysis.tables.frames import floats, keep, where
from analysis.validity.refusal import Refusal

_WHITE, _BLACK = "#ffffff", "#000000"


def plot_frontier(
    ax: Axes, rows: pd.DataFrame, frontier: pd.DataFrame, architectures: Sequence[str]
) -> panels.Labels:
    """Points, the fitted frontier solid inside and dashed outside the data, band and wall."""
    ends: panels.Labels = {}
    ax.set_xscale("log")
    for name, colour, marker in looks(architectures):
        mine = where(rows, "architecture", name)
        panels.plot_runs(ax, mine, ("flops", "loss_nats"), marker, colour)
        line = where(frontier, "architecture", name).sort_values("flops")
        if not len(line):
            continue
        inside = line["inside"].to_numpy(dtype=bool)
        ax.fill_between(line["flops"], line["low"], line["high"], color=colour, alpha=0.13, lw=0)
        ax.plot(line["flops"], line["loss_nats"], color=colour, lw=1.3, ls=(0, (4, 2)))
        ax.plot(line["flops"][inside], line["loss_nats"][inside], color=colour, lw=2.2)
        ends[name] = (*panels.last(line, "flops"), colour)
    if len(frontier):
        wall = float(floats(frontier, "flops").max())
        ax.set_xlim(right=wall * 2.2)
        ax.axvspan(wall, wall * 2.2, color=FAINT, alpha=0.35, lw=0)
        ax.text(
            wall * 1.45, 0.5, "no forecast beyond", rotation=90, ha="center", va="center",
            color=INK, fontsize=8, transform=ax.get_xaxis_transform(),
        )  # fmt: skip
    log_axes(ax, "training compute C [FLOP]", "flops")
    return ends


def device_hours(ax: Axes, speed: float) -> None:
    """A second axis on top: the compute in hours of one device that does `speed` FLOP/s."""
    per_hour = 3600.0 * speed
    both_ways = (
        lambda flops: np.asarray(flops) / per_hour,
        lambda hours: np.asarray(hours) * per_hour,
    )
    top = ax.secondary_xaxis("top", functions=both_ways)
    low, high = (np.log10(end / per_hour) for end in ax.get_xlim())
    powers = np.arange(np.ceil(low), np.floor(high) + 1)
    top.set_xticks(10.0**powers, [f"{10.0**power:g}" for power in powers])
    top.minorticks_off()
    top.tick_params(labelsize=8)
    top.set_xlabel("device-hours", fontsize=8)


def plot_isoflop(ax: Axes, curves: Sequence[IsoFlopCurve]) -> panels.Labels:
    """One colour a budget; minima with their intervals, hollow where at an edge."""
    ends: panels.Labels = {}
    ax.set_xscale("log")
    for place, curve in enumerate(curves):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        sizes = floats(curve.points, "parameters")
        panels.plot_runs(ax, curve.points, ("parameters", "loss_nats"), marker, colour)
        grid = np.geomspace(sizes.min(), sizes.max(), 60)
        ax.plot(grid, curve.loss(grid), color=colour, lw=1.2)
        label = f"{curve.flops:.1e} FLOP"
        ends[label] = (float(sizes[-1]), float(curve.points["loss_nats"].iloc[-1]), colour)
        if isinstance(curve.size, Refusal):
            continue
        lowest = float(curve.loss(np.array([curve.size.estimate]))[0])
        face = PAPER if curve.warning else colour
        low, high = (
            float(np.clip(end, *ax.get_xlim())) for end in (curve.size.low, curve.size.high)
        )
        ax.plot([low, high], [lowest, lowest], color=colour, lw=2.4)
        ax.plot(curve.size.estimate, lowest, "*", color=colour, mfc=face, ms=10)
    log_axes(ax, "parameters N", "parameters")
    return ends


def plot_optima(ax: Axes, optima: pd.DataFrame, minima: pd.DataFrame, quantity: str) -> None:
    """N*(C) or D*(C): the law's line with its band, and the parabolas' minima with theirs."""
    names = list(dict.fromkeys(optima["architecture"])) if len(optima) else []
    for name, colour, _ in looks(names):
        line = where(optima, "architecture", name)
        ax.fill_between(
            line["flops"], line[f"{quantity}_low"], line[f"{quantity}_high"], color=colour,
            alpha=0.15, lw=0,
        )  # fmt: skip
        ax.plot(line["flops"], line[quantity], color=colour, lw=1.8, label=f"{name}, fitted law")
    for name, colour, marker in looks(list(dict.fromkeys(minima["architecture"]))):
        mine = where(minima, "architecture", name)
        ax.plot(
            mine["flops"], mine[quantity], marker, color=colour, mec=INK, ms=6,
            label=f"{name}, isoFLOP",
        )  # fmt: skip
    log_axes(ax, "training compute C [FLOP]", "flops")
    ax.set_yscale("log")
    plain_ticks(ax, "y", quantity)
    ax.legend(frameon=False, fontsize=8)


def plot_contours(ax: Axes, surface: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Fitted loss over (N, D) with the runs on top; blank where nothing was run."""
    wide = surface.pivot(index="tokens", columns="parameters", values="loss_nats")
    x, y = wide.columns.to_numpy(dtype=float), wide.index.to_numpy(dtype=float)
    filled = ax.contourf(x, y, np.ma.masked_invalid(wide.to_numpy()), levels=12, cmap="cividis")
    # White with a dark edge: the colours below do not follow a dark page, so neither may these.
    lines = ax.contour(x, y, np.ma.masked_invalid(wide.to_numpy()), levels=6, colors=_WHITE,
                       linewidths=0.7)  # fmt: skip
    for text in ax.clabel(lines, fontsize=8.5, fmt="%.2f"):
        text.set_path_effects([withStroke(linewidth=1.6, foreground=_BLACK)])
    ax.plot(rows["parameters"], rows["tokens"], "o", color=PAPER, mec=INK, ms=5.5, mew=1.1)
    ax.grid(visible=False)
    panels.figure_of(ax).colorbar(filled, ax=ax, label="loss [nats per token]")
    panels.size_and_tokens(ax)


def plot_backtest(ax: Axes, errors: pd.DataFrame, rates: Mapping[str, float]) -> None:
    """Signed errors of forecasts against decades beyond their data, and the best law's interval."""
    ax.axhline(0.0, color=FAINT, lw=0.9)
    reach = 1.1 * float(floats(errors, "decades").max(initial=0.9))
    for name, colour, marker in looks(list(rates)):
        mine = where(errors, "law", name)
        ax.plot(
            mine["decades"], 100 * floats(mine, "error"), marker, color=colour, ms=5, mec=PAPER,
            mew=0.5, label=f"{name}: {100 * rates[name]:.1f} % per decade",
        )  # fmt: skip
    two = 200 * min(rates.values())
    ax.fill_between([0, reach], [0, -two * reach], [0, two * reach], color=FAINT, alpha=0.12, lw=0)
    ax.set_xlabel("decades of compute beyond the fit's data")
    ax.set_ylabel("observed minus forecast ln L [%]")
    ax.legend(frameon=False, fontsize=8)


def plot_profile(ax: Axes, profile: Profile, cloud: np.ndarray) -> None:
    """The rise of the misfit, the threshold, and the bootstrap's histogram below."""
    inside = profile.rise <= 4 * profile.threshold
    ax.plot(profile.values[inside], profile.rise[inside], color=COLOURS[0], lw=1.8)
    ax.axhline(profile.threshold, color=FAINT, lw=0.9, ls=(0, (4, 2)))
    ax.plot(profile.estimate, 0.0, "D", color=COLOURS[1], ms=6, mec=PAPER, clip_on=False, zorder=5)
    low, high = ax.get_xlim()
    near = cloud[(cloud >= low) & (cloud <= high)]
    if len(near):
        twin = ax.twinx()
        twin.hist(near, bins=24, color=FAINT, alpha=0.3)
        twin.set_yticks([])
        twin.grid(visible=False)
        twin.spines["right"].set_visible(False)
        twin.set_ylim(top=3 * twin.get_ylim()[1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(profile.label)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def plot_cloud(ax: Axes, cloud: pd.DataFrame, x: str, y: str) -> None:
    """Bootstrap replicates of two parameters against each other."""
    ax.plot(cloud[x], cloud[y], ".", color=COLOURS[0], ms=3, alpha=0.45)
    ax.plot(cloud[x].iloc[0], cloud[y].iloc[0], "D", color=COLOURS[1], ms=7, mec=PAPER)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4))


def plot_family(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Criteria of nested laws side by side, less the best of each; the best is a diamond."""
    labels = {"AICc": "AICc above the best", "BIC": "BIC above the best",
              "hold_out": "error on held-out trunks [%]"}  # fmt: skip
    shown = keep(table, np.isfinite(floats(table, "AICc")))
    places = np.arange(len(shown))
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        values = 100 * floats(shown, name) if name == "hold_out" else floats(shown, name)
        values = values if name == "hold_out" else values - values.min()
        best = int(values.argmin())
        ax.hlines(places, 0, values, color=FAINT, lw=1.2)
        ax.plot(values, places, "o", color=COLOURS[0], ms=6)
        ax.plot(values[best], places[best], "D", color=COLOURS[1], ms=8, mec=PAPER)
        if name == "hold_out":
            half = 100 * floats(shown, "hold_out_se")
            ax.hlines(places, values - half, values + half, color=COLOURS[0], lw=2.4)
        ax.set_xlabel(label)
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(places, list(shown["named"]))
