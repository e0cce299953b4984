"""How effects and sensitivities are drawn: shares, multipliers, counts, cooldown, design."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.tri import Triangulation

from analysis.effects.loss_to_loss import Transfer
from analysis.effects.variance_shares import COMPONENTS, Decomposition
from analysis.figures import panels
from analysis.figures.panels import (
    COLOURS,
    FAINT,
    INK,
    PAPER,
    RULE,
    log_axes,
    looks,
    plain_ticks,
    size_and_tokens,
)
from analysis.tables.frames import floats, groups, keep, strings, where

_COLOURS = (COLOURS[1], COLOURS[0], COLOURS[4], "#9aa4af", RULE)
SHARE_COLOURS: dict[str, str] = dict(zip(COMPONENTS, _COLOURS, strict=True))
# Fixed black is legible on these bars on a light and on a dark page; the others follow the page.
_BLACK = "#000000"
_LETTERS: dict[str, str] = dict(zip(COMPONENTS, (_BLACK, PAPER, _BLACK, _BLACK, INK), strict=True))
FILLS: tuple[Literal["full", "none", "left", "right", "bottom", "top"], ...] = (
    "full", "none", "left", "right", "bottom", "top",
)  # fmt: skip
HATCHES: dict[str, str] = dict(zip(COMPONENTS, ("", "", "////", "xxxx", ""), strict=True))


def plot_shares(ax: Axes, shares: Mapping[str, Decomposition]) -> None:
    """One stacked bar an evaluation set; whiskers are intervals of the first two shares."""
    for place, each in enumerate(shares.values()):
        left = 0.0
        for name in COMPONENTS:
            share = 100 * max(each.shares[name].estimate, 0.0)
            ax.barh(place, share, left=left, height=0.56, color=SHARE_COLOURS[name],
                    hatch=HATCHES[name], edgecolor=PAPER, lw=0.8,
                    label=name if place == 0 else None)  # fmt: skip
            if share > 9:
                box = {"fc": SHARE_COLOURS[name], "ec": "none", "pad": 1.5}
                ax.text(left + share / 2, place, f"{share:.0f} %", ha="center", va="center",
                        fontsize=9, color=_LETTERS[name], bbox=box)  # fmt: skip
            left += share
        for name, row in (("corpus", 0.36), ("architecture", 0.46)):
            ends = [100 * each.shares[name].low, 100 * each.shares[name].high]
            ax.plot(ends, [place + row] * 2, color=SHARE_COLOURS[name], lw=2.4,
                    solid_capstyle="butt")  # fmt: skip
    ax.set_yticks(range(len(shares)), list(shares))
    ax.set_ylim(len(shares) - 0.35, -0.5)
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of the variance of ln L at equal N and D [%]")
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=3, frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0))


def plot_transfer(
    ax: Axes, transfer: Transfer, corpora: Sequence[str], architectures: Sequence[str]
) -> panels.Labels:
    """Loss on one set against the neutral loss: colour and filling are the corpus."""
    ends: panels.Labels = {}
    markers = {name: marker for name, _, marker in looks(architectures)}
    fills = dict(zip(corpora, cycle(FILLS), strict=False))
    for corpus, colour, _ in looks(corpora):
        mine = where(transfer.points, "corpus", corpus)
        for (name,), rows in groups(mine, ["architecture"]):
            ax.plot(rows["loss_nats"], rows["loss_there"], markers[str(name)], color=colour, ms=5,
                    mew=0.8, fillstyle=fills[corpus], mfcalt=PAPER)  # fmt: skip
        if len(mine):
            line = mine.sort_values("loss_nats")
            ends[corpus] = (
                float(floats(line, "loss_nats")[-1]), float(floats(line, "loss_there")[-1]), colour,
            )  # fmt: skip
    log_axes(ax, "", "loss")
    ax.set_xlabel("loss on the neutral set [nats]")
    ax.set_ylabel(f"loss on {transfer.evaluation_set} [nats]")
    return ends


def plot_multipliers(ax: Axes, rows: pd.DataFrame) -> panels.Labels:
    """Multipliers with bands against N; hatched where every pair is refused, a line at 1."""
    ax.axhline(1.0, color=FAINT, lw=1.0)
    ends: panels.Labels = {}
    others = list(dict.fromkeys(strings(rows, "other").tolist()))
    for name, colour, marker in looks(others):
        mine = where(rows, "other", name)
        known = keep(mine, mine["factor"].notna())
        if not len(known):
            continue
        ax.fill_between(known["parameters"], known["low"], known["high"], color=colour, alpha=0.15,
                        lw=0)  # fmt: skip
        ax.plot(known["parameters"], known["factor"], marker + "-", color=colour, ms=4, lw=1.6,
                mec=PAPER, mew=0.4, markevery=3)  # fmt: skip
        ends[name] = (
            float(floats(known, "parameters")[-1]),
            float(floats(known, "factor")[-1]),
            colour,
        )
    refused = rows.groupby("parameters")["factor"].count()
    gone = np.asarray(refused.index, dtype=float)[refused.to_numpy() == 0]
    if len(gone):
        ax.axvspan(gone.min(), gone.max(), color="none", ec=FAINT, hatch="///", lw=0, alpha=0.5)
    log_axes(ax, "parameters N", "parameters")
    ax.set_ylabel("multiple of tokens at equal loss")
    return ends


def plot_counting(ax: Axes, rows: pd.DataFrame) -> None:
    """The exponent of N*(C) with its interval under each way of counting."""
    labels = []
    for place, row in enumerate(rows.to_dict("records")):
        first = row["parameters counted"] == "all parameters"
        colour, marker = (COLOURS[0], "o") if first else (COLOURS[1], "s")
        ax.plot([row["low"], row["high"]], [place] * 2, color=colour, lw=2.6, solid_capstyle="butt")
        ax.plot(row["exponent"], place, marker, color=colour, ms=7, mec=PAPER)
        labels.append(f"N: {row['parameters counted']}\n{fill('C: ' + row['FLOPs counted'], 38)}")
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_xlabel("exponent of the compute-optimal N in C")
    ax.grid(axis="y", visible=False)


def plot_cooldown(ax: Axes, rows: pd.DataFrame, architectures: Sequence[str]) -> None:
    """What the decay of the rate does to the loss, by size."""
    ax.axhline(0.0, color=FAINT, lw=0.9)
    for name, colour, marker in looks(architectures):
        mine = where(rows, "architecture", name)
        ax.plot(mine["parameters"], mine["percent"], marker, color=colour, ms=5, mec=PAPER, mew=0.5,
                label=name)  # fmt: skip
    ax.set_xscale("log")
    plain_ticks(ax, "x", "parameters")
    ax.set_xlabel("parameters N")
    ax.set_ylabel("loss after decay minus before [%]")
    ax.legend(frameon=False, fontsize=8.5)


def plot_design(ax: Axes, options: pd.DataFrame, done: pd.DataFrame, advised: pd.DataFrame) -> None:
    """Gain per sqrt(FLOP) over (N, D), the runs that exist, and the proposed ones numbered."""
    place = floats(options, "parameters"), floats(options, "tokens")
    mesh = Triangulation(*place, Triangulation(*np.log(place)).triangles)
    gain = np.log10(floats(options, "gain_per_root_flop"))
    drawn = ax.tricontourf(mesh, gain, levels=14, cmap="cividis")
    ax.plot(done["parameters"], done["tokens"], "o", color=PAPER, mec=INK, ms=4.5, mew=0.9)
    places: dict[tuple[float, float], list[str]] = {}
    for number, row in enumerate(advised.to_dict("records"), 1):
        at = (float(row["parameters"]), float(row["tokens"]))
        places.setdefault(at, []).append("test" if row["role"] == "hold-out" else str(number))
    for (x, y), names in places.items():
        ax.annotate(
            ", ".join(names), (x, y), ha="center", va="center", fontsize=9, color=INK,
            bbox={"boxstyle": "round,pad=0.25", "fc": PAPER, "ec": INK, "lw": 0.8},
        )  # fmt: skip
    panels.figure_of(ax).colorbar(drawn, ax=ax, label="log10 of gain per sqrt(FLOP), best = 0")
    size_and_tokens(ax)
    ax.grid(visible=False)
