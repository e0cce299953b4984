"""Decoding speed with a cache and without: the figure, and ratios of speeds."""

from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep

COPIED = "copying its cache alone"
"""The part of a decoding step that copies the keys and values to append one token."""
SPARED = "attention cached less its copying"
"""Attention with a preallocated cache: computed from the two measurements, not run."""
Contender = tuple[str, str]
HYBRID, ATTENTION = ("hybrid", "cached"), ("attention", "cached")
COMPARISONS: tuple[tuple[Contender, Contender], ...] = (
    (HYBRID, ATTENTION),
    (("window", "cached"), ATTENTION),
    (("recurrence", "cached"), ATTENTION),
    (HYBRID, ("hybrid", "replayed")),
    (ATTENTION, ("attention", "replayed")),
    (HYBRID, ("attention", "uncached")),
    *(((name, "cached"), (name, "uncached")) for name in ("hybrid", "attention")),
    *(((name, "cached"), (name, "uncached")) for name in ("window", "recurrence")),
)
CLAIM = 51.47
WORDS = {"cached": "cached", "uncached": "no cache", "replayed": "no cache, token by token"}
LOOKS = {
    name: (panels.COLOURS[i], panels.MARKERS[i])
    for i, name in enumerate(("hybrid", "attention", "window", "recurrence"))
}
STYLES = {"cached": "-", "uncached": "--"}
BARS = (
    (HYBRID, ("hybrid", "replayed"), "itself without a cache,\nin a loop over the text"),
    (HYBRID, ("hybrid", "uncached"), "itself without a cache,\nthe text in one pass"),
    (HYBRID, ("attention", "uncached"), "attention without a cache"),
    (HYBRID, ATTENTION, "attention with its cache"),
)


def summarise(rounds: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles over the rounds of each contender at each context."""
    keys = ["kind", "model", "mode", "context"]
    rows = [
        {
            **dict(zip(keys, key, strict=True)),
            **_spread(floats(part, "tokens_per_second"), "tokens_per_second"),
            "state_bytes": int(floats(part, "state_bytes")[0]),
        }
        for key, part in groups(rounds, keys)
    ]
    return pd.DataFrame(rows)


def ratios(rounds: pd.DataFrame) -> pd.DataFrame:
    """Ratios of speeds within rounds, grouped by context.

    A row for each comparison and context at which both were measured.
    """
    rows = []
    for (kind, context), part in groups(rounds, ["kind", "context"]):
        compared = {
            (" ".join(upper), " ".join(lower)): _within_rounds(part, upper, lower)
            for upper, lower in COMPARISONS
        }
        compared[" ".join(HYBRID), SPARED] = _over_spared(part)
        for (upper, lower), shares in compared.items():
            if len(shares):
                named = {"kind": kind, "context": context, "upper": upper, "lower": lower}
                rows.append({**named, **_spread(shares, "ratio")})
    return pd.DataFrame(rows)


def draw(rounds: pd.DataFrame, name: str) -> ReportFigure:
    """Speed against context, and beside it what a generation after a short prompt compares."""
    data = summarise(rounds)
    with panels.styled():
        figure = Figure(figsize=(12.0, 4.9), layout="constrained")
        speed, post = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_speed(speed, data)
        _draw_generation(post, rounds)
        figure.suptitle(_title(rounds), x=0.01, ha="left", fontsize=11.5)
    caption = "Marks: medians over rounds taken in turns; bars: quartiles. Random weights."
    return ReportFigure(name, _title(rounds), caption, figure, data)


def _draw_speed(ax: Axes, data: pd.DataFrame) -> None:
    ends: panels.Labels = {}
    steps = keep(data, (data["kind"] == "step") & data["mode"].isin(STYLES))
    for (model, mode), line in groups(steps, ["model", "mode"]):
        colour, marker = LOOKS[model]
        middle = floats(line, "tokens_per_second")
        reach = np.abs(line[["low", "high"]].to_numpy(float).T - middle)
        ax.errorbar(
            line["context"], middle, reach, color=colour, fmt=marker, ls=STYLES[mode], ms=4.5,
            mec=panels.PAPER, mew=0.5, lw=1.5, elinewidth=0.9,
        )  # fmt: skip
        ends[f"{model}, {WORDS[mode]}"] = (floats(line, "context")[-1], middle[-1], colour)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    contexts = sorted(int(each) for each in steps["context"].unique())
    ax.xaxis.set_major_locator(FixedLocator([float(each) for each in contexts]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(each) for each in contexts])
    ax.set_xlabel("context [tokens]")
    ax.set_ylabel("decoding [tokens/s]")
    ax.set_title("One more token at each context")
    panels.label_ends(ax, ends)


def _draw_generation(ax: Axes, rounds: pd.DataFrame) -> None:
    """How many times as fast as each of four others the cached hybrid generates."""
    places, labels = [], []
    for upper, lower, label in BARS:
        speed = _found(rounds, "generation", upper, lower)
        if speed is None:
            continue
        place, ratio = len(places), speed["ratio"]
        colour = LOOKS[lower[0]][0]
        ax.barh(place, ratio - 1, left=1, height=0.5, color=colour, alpha=0.85)
        ax.plot([speed["low"], speed["high"]], [place, place], color=panels.INK, lw=1.2)
        ax.annotate(
            f"{ratio:.3g}x", (max(ratio, speed["high"], 1), place), xytext=(6, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
        places.append(place)
        labels.append(label)
    ax.axvline(1.0, color=panels.FAINT, lw=0.9)
    ax.axvline(CLAIM, color=panels.FAINT, lw=1.0, ls=":")
    ax.annotate(
        "the post's 51x", (CLAIM, 0.02), xycoords=ax.get_xaxis_transform(), rotation=90,
        xytext=(-4, 0), textcoords="offset points", ha="right", color=panels.FAINT, fontsize=9,
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(0.15, 300)
    ax.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_yticks(places, labels)
    ax.set_ylim(len(places) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("speed of the cached hybrid over ... [ratio]")
    ax.set_axisbelow(True)
    ax.set_title(f"Generating up to {_generated(rounds)} tokens")


def _title(rounds: pd.DataFrame) -> str:
    speeds = [_found(rounds, "generation", HYBRID, lower) for _, lower, _ in BARS]
    looped, passed, _, honest = (None if each is None else each["ratio"] for each in speeds)
    if looped is None or passed is None or honest is None:
        return "Decoding with a cache and without"
    return (
        f"Up to {_generated(rounds)} tokens the hybrid's cache is worth {looped:.0f}x over a loop "
        f"and {passed:.2g}x over one pass; beside attention with its cache it runs at {honest:.2g}x"
    )


def _generated(rounds: pd.DataFrame) -> int:
    """Tokens at the end of a generation."""
    return int(floats(keep(rounds, rounds["kind"] == "generation"), "context")[0])


def _found(
    rounds: pd.DataFrame, kind: str, upper: Contender, lower: Contender, context: int | None = None
) -> dict[str, float] | None:
    part = keep(rounds, rounds["kind"] == kind)
    if context is not None:
        part = keep(part, part["context"] == context)
    shares = _within_rounds(part, upper, lower)
    return _spread(shares, "ratio") if len(shares) else None


def _within_rounds(part: pd.DataFrame, upper: Contender, lower: Contender) -> np.ndarray:
    return (_speeds(part, upper) / _speeds(part, lower)).dropna().to_numpy(float)


def _over_spared(part: pd.DataFrame) -> np.ndarray:
    seconds = 1 / _speeds(part, ATTENTION) - 1 / _speeds(part, ("attention", COPIED))
    return (_speeds(part, HYBRID) * seconds).dropna().to_numpy(float)


def _speeds(part: pd.DataFrame, contender: Contender) -> pd.Series:
    """Tokens a second by context and round."""
    model, mode = contender
    mine = keep(part, (part["model"] == model) & (part["mode"] == mode))
    by_turn = mine.set_index(["context", "round"])
    return cast("pd.Series", by_turn["tokens_per_second"])


def _spread(values: np.ndarray, name: str) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(middle), "low": float(low), "high": float(high), "rounds": len(values)}
